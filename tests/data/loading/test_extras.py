"""Further members of a sample: from the shard through the workers into the batch."""

import io
import json
import tarfile
from collections.abc import Callable
from contextlib import closing
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipcluster.check.deep import check_sample
from clipcluster.check.plain import Findings
from clipcluster.data.loading.batch import Batch
from clipcluster.data.loading.extras import concatenated, decoders_of, stacked
from clipcluster.data.loading.loader import Loader
from clipcluster.data.loading.worker import _SMALL, PartialBatch, reduced
from clipcluster.data.sampling.sampler import Sampler
from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.indexing import index_folder
from clipcluster.data.shards.open import open_folder
from clipcluster.data.tokenizer import ByteTokenizer
from clipcluster.errors import UserError
from clipcluster.recipe.sections.data import Data, Source
from clipcluster.runtime.outcome import DataError
from tests.data.sources import sampler_source
from tests.shard_writer import ShardWriter

TOKENIZER = ByteTokenizer(24)
EXTRAS = {
    "emb.npy": "toy_decoders:array",
    "score.txt": "toy_decoders:score",
    "paug.json": "json:loads",
    "boxes.npy": "toy_decoders:array_in_list",
}


@pytest.fixture(autouse=True)
def _decoders_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def members(number: int, image: bytes) -> dict[str, bytes]:
    return {
        "png": image,
        "txt": b"caption of %d" % number,
        "emb.npy": npy(np.full((2, 3), number, np.float16)),
        "score.txt": b"%d.5" % number,
        "paug.json": json.dumps({"angle": number}).encode(),
        "boxes.npy": npy(np.full((number % 3, 4), number, np.float32)),
    }


@pytest.fixture
def write(tmp_path: Path, picture: Callable[..., bytes]) -> Callable[..., Dataset]:
    """write(change) -> 30 samples in shards of 7; change(number, members) alters what a sample has."""

    def make(change: Callable[[int, dict[str, bytes]], None] = lambda number, members: None) -> Dataset:
        with ShardWriter(tmp_path / "s", samples_per_shard=7) as writer:
            for number in range(30):
                held = members(number, picture(number))
                change(number, held)
                writer.add_members(f"s{number:03d}", held)
        index_folder(tmp_path / "s")
        return open_folder(tmp_path / "s")

    return make


def loader_of(shards: Dataset, section: Data, extras: dict[str, str], **options: Any) -> Loader:
    source = sampler_source(shards.sample_counts, shards.caption_counts())
    sampler = Sampler([source], batch_size=8, seed=3, captions="first")
    return Loader([shards], sampler, section, tokenizer=TOKENIZER, seed=0, extras=extras, **options)


def take(loader: Loader, count: int) -> list[Batch]:
    with closing(loader):
        return [next(loader) for _ in range(count)]


def require_own(batch: Batch) -> None:
    """Every sample's extras are its own."""
    numbers = [int(key[1:]) for _, _, key in batch.keys]
    embeddings, scores = batch.extras["emb.npy"], batch.extras["score.txt"]
    assert isinstance(embeddings, torch.Tensor)
    assert isinstance(scores, torch.Tensor)
    assert (embeddings.dtype, embeddings.shape) == (torch.float16, (len(batch), 2, 3))
    assert embeddings[:, 1, 2].tolist() == numbers
    assert (scores.dtype, scores.tolist()) == (torch.float32, [number + 0.5 for number in numbers])
    assert batch.extras["paug.json"] == [{"angle": number} for number in numbers]
    assert [array.shape for (array,) in batch.extras["boxes.npy"]] == [(n % 3, 4) for n in numbers]


@pytest.mark.parametrize("workers", [0, 2])
def test_extras_travel_by_name_from_shard_to_batch(
    write: Callable[..., Dataset], data_section: Callable[..., Data], workers: int
) -> None:
    shards = write()
    batches = take(loader_of(shards, data_section(), EXTRAS, workers=workers), 4)
    for batch in batches:
        assert list(batch.extras) == list(EXTRAS)
        require_own(batch)
    (resumed,) = take(loader_of(shards, data_section(), EXTRAS, workers=workers, start=3), 1)
    assert resumed.keys == batches[3].keys
    require_own(resumed)
    cut = batches[0].cut(3, 5)
    require_own(cut)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_a_decoder_in_a_worker_has_one_thread_that_never_spins(
    write: Callable[..., Dataset], data_section: Callable[..., Data]
) -> None:
    (batch,) = take(loader_of(write(), data_section(), {"txt": "toy_decoders:threads"}, workers=1), 1)
    threads = [number for number, policy in batch.extras["txt"] if policy == "passive"]
    assert len(threads) == len(batch)
    # besides the decoder's: one that waits for the rank's end, one that sends
    assert max(threads) <= 3


def test_only_the_members_that_are_wanted_are_read(
    write: Callable[..., Dataset], data_section: Callable[..., Data]
) -> None:
    (batch,) = take(loader_of(write(), data_section(), {}), 1)
    assert batch.extras == {}
    (batch,) = take(loader_of(write(), data_section(), {"score.txt": EXTRAS["score.txt"]}), 1)
    assert list(batch.extras) == ["score.txt"]


def test_a_sample_without_a_member_or_with_a_broken_one_is_bad(
    write: Callable[..., Dataset], data_section: Callable[..., Data]
) -> None:
    def change(number: int, held: dict[str, bytes]) -> None:
        if number == 4:
            del held["score.txt"]
        if number == 13:
            held["emb.npy"] = held["emb.npy"][:-5]

    batches = take(loader_of(write(change), data_section(), EXTRAS, workers=2), 6)
    told = {entry["key"]: (entry["shard"], entry["reason"]) for batch in batches for entry in batch.bad}
    assert set(told) == {"s004", "s013"}
    assert told["s004"] == ("00000.tar", "no member score.txt")
    assert told["s013"][0] == "00001.tar"
    assert told["s013"][1].startswith("emb.npy: ValueError: ")
    assert sum(len(batch.bad) for batch in batches) == 2
    for batch in batches:
        assert not {"s004", "s013"} & {key for _, _, key in batch.keys}
        require_own(batch)


def test_a_member_that_no_sample_has_is_an_error_that_names_shard_and_member(
    write: Callable[..., Dataset], data_section: Callable[..., Data]
) -> None:
    loader = loader_of(write(), data_section(), {"syn.json": "json:loads"})
    with pytest.raises(
        DataError, match=r"no sample of shard .*0000\d\.tar can be decoded: no member syn\.json"
    ):
        take(loader, 1)


def test_the_deep_check_decodes_the_members_that_a_task_needs(write: Callable[..., Dataset]) -> None:
    def change(number: int, held: dict[str, bytes]) -> None:
        if number == 0:
            del held["score.txt"]

    source, findings = Source(shards=str(write(change).shard_path(0).parent)), Findings()
    check_sample("data.train.0", source, True, EXTRAS, TOKENIZER, findings)
    assert "samples that cannot be decoded: 00000.tar s000: no member score.txt" in findings.warnings[0]
    with pytest.raises(UserError, match=r"00000\.tar s000: no member syn\.json"):
        check_sample("data.train.0", source, True, {"syn.json": "json:loads"}, TOKENIZER, findings)


def test_arrays_of_different_shapes_are_refused(
    write: Callable[..., Dataset], data_section: Callable[..., Data]
) -> None:
    loader = loader_of(write(), data_section(), {"boxes.npy": "toy_decoders:array"}, workers=1)
    with pytest.raises(
        DataError, match=r"0000\d\.tar, key s0\d\d: its member boxes\.npy is float32"
    ) as caught:
        take(loader, 1)
    assert "in a list" in caught.value.advice


def test_parts_of_several_workers_must_agree() -> None:
    narrow, wide = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(DataError, match=r"^b: its member npz is float32 of shape \(4,\), and that of a is"):
        concatenated("npz", [narrow, wide], ["a", "b"])
    with pytest.raises(DataError, match=r"^b: its member npz is no array"):
        concatenated("npz", [narrow, ["words"]], ["a", "b"])


def test_numbers_and_tensors_stack() -> None:
    samples = ["a", "b"]
    assert torch.equal(stacked("n", [1, 2], samples), torch.tensor([1, 2]))  # type: ignore[arg-type]
    halves = stacked("n", [torch.ones(2, dtype=torch.bfloat16)] * 2, samples)
    assert isinstance(halves, torch.Tensor)
    assert halves.dtype == torch.bfloat16
    assert stacked("n", ["x", None], samples) == ["x", None]
    read_only = np.frombuffer(b"\1\2", np.uint8)
    assert stacked("n", [read_only] * 2, samples).tolist() == [[1, 2], [1, 2]]  # type: ignore[union-attr]


def test_a_partial_batch_keeps_every_dtype_on_its_way() -> None:
    extras: dict[str, Any] = {
        "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "flags": torch.tensor([True, False]),
        "none": torch.empty(2, 0),
        "words": ["a", "b"],
    }
    tokens = torch.arange(4).view(2, 2).T

    def pickled(images: torch.Tensor) -> bytes:
        message = io.BytesIO()
        pickler = ForkingPickler(message)
        pickler.dispatch_table[torch.Tensor] = reduced
        pickler.dump(PartialBatch(1, images, tokens, extras=extras))
        return message.getvalue()

    message = pickled(torch.zeros(_SMALL + 1, dtype=torch.uint8))
    assert len(message) < 2000  # large pixels travel by shared memory
    assert len(pickled(torch.zeros(_SMALL))) > 4 * _SMALL  # nothing else does, however large
    sent = ForkingPickler.loads(message)
    assert sent.images.shape == (_SMALL + 1,)
    assert sent.tokens.tolist() == [[0, 2], [1, 3]]
    for name in ("half", "flags", "none"):
        assert sent.extras[name].dtype == extras[name].dtype
        assert torch.equal(sent.extras[name], extras[name])
    assert sent.extras["words"] == ["a", "b"]


def test_members_of_one_sample_end_where_the_next_begins(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:

        def add(name: str, data: bytes) -> None:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))

        add("a.png", picture(0))
        add("a.txt", b"first")
        add("__info__/notes.json", b"{}")  # belongs to no sample
        add("a.Score.TXT", b"1")
        add("b.png", picture(1))
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.SYMTYPE, "b.png"
        tar.addfile(link)
        add("b.score.txt", b"2")  # behind another key: no member of the first b
        add("d.png", picture(2))
        add("d.score.txt", b"3")
        add("d.png", picture(3))  # comes again: another sample
        add("d.score.txt", b"4")
    index_folder(tmp_path)
    shards = open_folder(tmp_path)
    found = [shards.read_members(position, {"score.txt"}) for position in range(shards.n_samples)]
    assert found == [{"score.txt": b"1"}, {}, {"score.txt": b"3"}]


def test_a_decoder_that_does_not_exist_is_refused_before_any_worker_starts() -> None:
    with pytest.raises(AttributeError, match="no_such_function"):
        decoders_of({"npz": "json:no_such_function"})
