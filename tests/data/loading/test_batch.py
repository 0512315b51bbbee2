"""What a batch carries, and normalising."""

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
