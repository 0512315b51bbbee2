"""What a batch carries, and normalising."""

import pytest
import torch

from clipcluster.data.loading.batch import Batch, normalise


def test_normalise() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    out = normalise(images, mean, std)
    assert out.dtype == torch.float32
    wanted = (images / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(normalise(images, torch.tensor(mean), torch.tensor(std)), out)


def test_a_batch_moves_whole() -> None:
    images = torch.zeros((2, 3, 4, 4), dtype=torch.uint8)
    batch = Batch(5, images, None, None, torch.tensor([1, -1]), [(0, "a.tar", "k")])
    moved = batch.to("meta")
    assert moved.images.device.type == "meta"
    assert moved.classes is not None
    assert moved.classes.device.type == "meta"
    assert (moved.index, moved.keys, moved.tokens, len(moved)) == (5, batch.keys, None, 2)


def whole() -> Batch:
    images = torch.arange(6 * 3, dtype=torch.uint8).view(6, 3, 1, 1)
    tokens = torch.arange(12).view(6, 2)
    extras = {"npz": torch.arange(24.0).view(6, 2, 2), "note.txt": list("abcdef")}
    keys = [(slot, "a.tar", f"k{slot}") for slot in range(10, 16)]
    return Batch(5, images, tokens, tokens >= 0, None, keys, [{"key": "bad"}], extras)


def test_a_cut_batch_holds_views_of_the_samples_asked_for() -> None:
    batch = whole()
    cut = batch.cut(2, 5)
    assert (len(cut), cut.index, cut.classes, cut.bad) == (3, 5, None, [])
    assert cut.keys == batch.keys[2:5]
    assert cut.tokens is not None
    assert cut.mask is not None
    assert batch.tokens is not None
    assert cut.tokens.tolist() == batch.tokens[2:5].tolist()
    assert cut.mask.shape == (3, 2)
    assert cut.images.data_ptr() == batch.images[2].data_ptr()
    extra = cut.extras["npz"]
    assert isinstance(extra, torch.Tensor)
    assert extra.tolist() == batch.extras["npz"][2:5].tolist()  # type: ignore[union-attr]
    assert cut.extras["note.txt"] == ["c", "d", "e"]
    with pytest.raises(ValueError, match="no samples 4 to 7 in a batch of 6"):
        batch.cut(4, 7)


def test_micro_batches_are_the_batch_in_order() -> None:
    batch = whole()
    parts = list(batch.micro_batches(3))
    assert [len(part) for part in parts] == [2, 2, 2]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert [key for part in parts for key in part.keys] == batch.keys
    with pytest.raises(ValueError, match="a batch of 6 cannot be cut into 4 equal micro-batches"):
        next(batch.micro_batches(4))


def test_extras_move_with_their_batch() -> None:
    moved = whole().to("meta")
    extra = moved.extras["npz"]
    assert isinstance(extra, torch.Tensor)
    assert extra.device.type == "meta"
    assert moved.extras["note.txt"] == list("abcdef")
