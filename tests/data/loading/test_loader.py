"""The loader for real: the same batches whatever the ranks, the workers and the resume point."""

import json
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from clipcluster.data.images.decode import decode
from clipcluster.data.images.transforms import draw_seed, evaluation_transform, train_transform
from clipcluster.data.loading.batch import Batch
from clipcluster.data.loading.loader import Loader, evaluation_batches
from clipcluster.data.sampling.sampler import Sampler
from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.indexing import index_folder
from clipcluster.data.shards.open import open_folder
from clipcluster.data.tokenizer import ByteTokenizer
from clipcluster.recipe.sections.data import Data
from clipcluster.runtime.outcome import DataError
from clipcluster.runtime.world import World
from tests.data.sources import sampler_source
from tests.shard_writer import ShardWriter

TOKENIZER = ByteTokenizer(24)


def sampler_of(sources: list[Dataset], batch_size: int = 8, captions: str = "all") -> Sampler:
    shapes = [
        sampler_source(
            shards.sample_counts, shards.caption_counts(), None if len(sources) == 1 else float(number + 1)
        )
        for number, shards in enumerate(sources)
    ]
    return Sampler(
        shapes,
        batch_size=batch_size,
        seed=3,
        captions=captions,  # type: ignore[arg-type]
        lanes=4,
        window=4,
        full_shuffle_below=10,
        epoch_samples=None,
    )


def take(loader: Loader, count: int) -> list[Batch]:
    with closing(loader):
        return [next(loader) for _ in range(count)]


def same(a: Batch, b: Batch) -> None:
    assert a.index == b.index
    assert a.keys == b.keys
    for name in ("images", "tokens", "mask", "classes"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def joined(shares: list[Batch]) -> Batch:
    assert len({share.index for share in shares}) == 1
    tensors = {
        name: torch.cat([getattr(s, name) for s in shares])
        for name in ("images", "tokens", "mask", "classes")
    }
    return Batch(shares[0].index, keys=[key for share in shares for key in share.keys], **tensors)


@pytest.fixture
def shards(tmp_path: Path, make_shards: Callable[..., Path]) -> Dataset:
    return open_folder(make_shards(tmp_path / "digits", 61, per_shard=9))


@pytest.fixture
def section(data_section: Callable[..., Data]) -> Data:
    return data_section()


def test_a_batch_is_what_the_order_says(shards: Dataset, section: Data) -> None:
    sampler = sampler_of([shards])
    transform = train_transform(section.image)
    (batch,) = take(Loader([shards], sampler, section, tokenizer=TOKENIZER, seed=7, start=4), 1)
    draws = sampler.batch(4)
    assert batch.index == 4
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (8, 3, 8, 8))
    for slot in range(8):
        position, caption = int(draws.position[slot]), int(draws.caption[slot])
        sample = shards.read(position)
        seed = draw_seed(7, 0, int(draws.pass_index[slot]), position, caption)
        assert torch.equal(batch.images[slot], transform(decode(sample.image), seed))
        assert torch.equal(batch.tokens[slot], TOKENIZER([sample.captions[caption]])[0][0])
        assert batch.keys[slot] == (slot, sample.shard, sample.key)
        assert batch.classes is not None
        assert batch.classes[slot] == sample.cls


def test_the_same_batches_for_every_number_of_ranks_and_workers(
    tmp_path: Path, make_shards: Callable[..., Path], section: Data
) -> None:
    first = open_folder(make_shards(tmp_path / "a", 61, per_shard=9, bad={5, 6, 30}))
    second = open_folder(make_shards(tmp_path / "b", 40, per_shard=20, bad={0}))
    sources = [first, second]
    sampler = sampler_of(sources)
    whole = take(Loader(sources, sampler, section, tokenizer=TOKENIZER, seed=0), 25)
    numbers = random.Random(0)
    for world_size in (1, 2, 4):
        for workers in (0, 1, 2, 3):
            start = numbers.randrange(22)
            shares = [
                take(
                    Loader(
                        sources, sampler, section, tokenizer=TOKENIZER, seed=0,
                        rank=rank, world_size=world_size, workers=workers, start=start,
                    ),
                    3,
                )
                for rank in range(world_size)
            ]  # fmt: skip
            for step in range(3):
                same(joined([rank[step] for rank in shares]), whole[start + step])


def test_ranks_that_do_not_divide_the_batch_still_share_it(shards: Dataset, section: Data) -> None:
    sampler = sampler_of([shards])
    parts = [
        take(
            Loader([shards], sampler, section, tokenizer=TOKENIZER, seed=0, rank=r, world_size=3, workers=0),
            1,
        )[0]
        for r in range(3)
    ]
    same(joined(parts), take(Loader([shards], sampler, section, tokenizer=TOKENIZER, seed=0), 1)[0])


def test_skipped_ranges_are_stepped_over(shards: Dataset, section: Data) -> None:
    sampler = sampler_of([shards])
    loader = Loader(
        [shards],
        sampler,
        section,
        tokenizer=TOKENIZER,
        seed=0,
        start=1,
        skipped=[(3, 5), (2, 4), (7, 8)],
        workers=1,
    )
    assert [batch.index for batch in take(loader, 4)] == [1, 5, 6, 8]


def test_torchs_random_numbers_are_left_alone(shards: Dataset, section: Data) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(Loader([shards], sampler_of([shards]), section, tokenizer=TOKENIZER, seed=0, workers=1), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_without_a_tokenizer_there_are_no_tokens(shards: Dataset, section: Data) -> None:
    (batch,) = take(
        Loader([shards], sampler_of([shards], captions="first"), section, tokenizer=None, seed=0), 1
    )
    assert batch.tokens is None
    assert batch.mask is None


@pytest.mark.parametrize("captions", ["all", "random", "first"])
def test_a_sample_without_a_caption_is_never_drawn(
    tmp_path: Path, make_shards: Callable[..., Path], section: Data, captions: str
) -> None:
    silent = {0, 4, 5, 13}
    folder = make_shards(
        tmp_path / "s",
        21,
        bad={3},
        texts=lambda number: [] if number in silent else [f"of {number}", "another"],
    )
    shards = open_folder(folder)
    sampler = sampler_of([shards], captions=captions)
    batches = take(Loader([shards], sampler, section, tokenizer=TOKENIZER, seed=0), 8)
    used = {int(key[1:]) for batch in batches for _, _, key in batch.keys}
    assert used == set(range(21)) - silent - {3}
    assert all(int(real.sum()) > 2 for batch in batches for real in batch.mask)


def test_a_bad_sample_is_replaced_by_the_next_good_one_and_told_once(
    tmp_path: Path, make_shards: Callable[..., Path], section: Data
) -> None:
    bad = {3, 7, 8, 9, 10, 17}  # the last three of the shard 9 … 17 … and runs over a shard's end
    shards = open_folder(make_shards(tmp_path / "s", 27, per_shard=9, bad=bad))
    sampler = sampler_of([shards], captions="first", batch_size=9)
    for workers in (0, 2):
        batches = take(Loader([shards], sampler, section, tokenizer=TOKENIZER, seed=0, workers=workers), 9)
        told = [(entry["shard"], entry["key"]) for batch in batches for entry in batch.bad]
        assert sorted(told) == [(f"{number // 9:05d}.tar", f"s{number:05d}") for number in sorted(bad)]
        assert all("HTML" in entry["reason"] for batch in batches for entry in batch.bad)
        for batch in batches:
            draws = sampler.batch(batch.index)
            for slot, (position, key) in enumerate(zip(draws.position.tolist(), batch.keys, strict=True)):
                first = position // 9 * 9
                ring = [first + (position - first + step) % 9 for step in range(9)]
                used = next(number for number in ring if number not in bad)
                assert key == (slot, f"{used // 9:05d}.tar", f"s{used:05d}")
                seed = draw_seed(0, 0, int(draws.pass_index[slot]), position, int(draws.caption[slot]))
                image = train_transform(section.image)(decode(shards.read(used).image), seed)
                assert torch.equal(batch.images[slot], image)


def test_a_shard_without_a_good_sample_is_an_error(
    tmp_path: Path, make_shards: Callable[..., Path], section: Data
) -> None:
    shards = open_folder(make_shards(tmp_path / "s", 18, per_shard=9, bad=range(9)))
    for workers in (0, 1):
        loader = Loader(
            [shards],
            sampler_of([shards], captions="first"),
            section,
            tokenizer=TOKENIZER,
            seed=0,
            workers=workers,
        )
        with pytest.raises(DataError, match=r"no sample of shard .*00000\.tar can be decoded: HTML"):
            take(loader, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_changes_while_it_is_used_is_refused(
    shards: Dataset, section: Data, workers: int
) -> None:
    sampler = sampler_of([shards], captions="first")
    path = shards.shard_path(int(shards.locate(int(sampler.batch(0).position[0]))[0]))
    path.write_bytes(path.read_bytes() + bytes(1024))
    loader = Loader([shards], sampler, section, tokenizer=TOKENIZER, seed=0, workers=workers)
    with pytest.raises(DataError, match=f"{path.name} changed since it was indexed") as caught:
        take(loader, 1)
    assert "clipcluster shards index" in caught.value.advice
    with pytest.raises(ValueError, match="closed"):
        next(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unexpected_error_names_shard_and_key(shards: Dataset, section: Data, workers: int) -> None:
    chokes = operator.neg  # no tokenizer: TypeError at its first list of texts
    loader = Loader([shards], sampler_of([shards]), section, tokenizer=chokes, seed=0, workers=workers)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"0000\d\.tar, key s000\d\d: TypeError: bad operand"):
        take(loader, 1)


def _evaluated(shards: Dataset, section: Data, world_size: int, workers: int) -> Iterator[tuple]:
    for rank in range(world_size):
        world = World(rank, world_size, rank, torch.device("cpu"))
        seen = list(evaluation_batches(shards, section, world=world, batch_size=16, workers=workers))
        assert len(seen) == 4
        for batch in seen:
            yield from zip(
                batch.positions.tolist(), batch.images, batch.captions, batch.classes.tolist(), strict=True
            )


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 1), (4, 0), (1, 3)])
def test_evaluation_sees_every_sample_once(
    shards: Dataset, section: Data, world_size: int, workers: int
) -> None:
    transform = evaluation_transform(section.image)
    seen = sorted(_evaluated(shards, section, world_size, workers), key=lambda entry: entry[0])
    assert [position for position, *_ in seen] == list(range(61))
    for position, image, captions, cls in seen:
        sample = shards.read(position)
        assert torch.equal(image, transform(decode(sample.image)))
        assert (captions, cls) == (sample.captions, sample.cls)


def test_evaluation_leaves_bad_samples_out_and_says_so(
    tmp_path: Path, make_shards: Callable[..., Path], section: Data
) -> None:
    shards = open_folder(make_shards(tmp_path / "s", 10, bad={2, 3}))
    world = World(0, 1, 0, torch.device("cpu"))
    batches = list(evaluation_batches(shards, section, world=world, batch_size=2))
    assert [batch.positions.tolist() for batch in batches] == [[0, 1], [], [4, 5], [6, 7], [8, 9]]
    assert [entry["key"] for entry in batches[1].bad] == ["s00002", "s00003"]
    assert batches[1].images.shape == (0, 3, 8, 8)


def test_memory_of_the_sampler_stays_in_the_rank(shards: Dataset, section: Data) -> None:
    """Workers get work items, never the sampler: its columns may be gigabytes."""

    class Unpicklable(Sampler):
        def __reduce__(self) -> str:
            raise TypeError("the sampler was sent to a worker")

    sampler = sampler_of([shards])
    sampler.__class__ = Unpicklable
    assert len(take(Loader([shards], sampler, section, tokenizer=TOKENIZER, seed=0, workers=1), 1)) == 1
    assert np.array_equal(sampler.batch(0).position, sampler_of([shards]).batch(0).position)


def test_captions_come_from_the_field_that_was_drawn(
    tmp_path: Path, picture: Callable[..., bytes], section: Data
) -> None:
    with ShardWriter(tmp_path / "s", samples_per_shard=9) as writer:
        for number in range(40):
            members = {"png": picture(number), "txt": b"own %d" % number}
            members["syn.json"] = json.dumps({"syn_text": [f"made {number} {i}" for i in range(3)]}).encode()
            if number % 4 == 0:
                del members["txt"]
            writer.add_members(f"{number:03d}", members)
    index_folder(tmp_path / "s", captions_choice="syn.json:syn_text")
    shards = open_folder(tmp_path / "s", captions_in={"default": 1, "syn.json:syn_text": 1})
    shape = sampler_source(
        shards.sample_counts,
        more_than=shards.more_than,
        fields=shards.fields,
    )
    sampler = Sampler([shape], batch_size=8, seed=1, captions="random")
    drawn = {"own": 0, "made": 0}
    for batch in take(Loader([shards], sampler, section, tokenizer=TOKENIZER, seed=1), 40):
        for tokens, (_, _, key) in zip(batch.tokens, batch.keys, strict=True):
            texts = [f"own {int(key)}", *(f"made {int(key)} {i}" for i in range(3))]
            (text,) = [text for text in texts if torch.equal(TOKENIZER([text])[0][0], tokens)]
            assert text.startswith("made") or int(key) % 4
            drawn[text.split()[0]] += 1
    # a quarter of the samples has but one field, the others take each with one half
    assert abs(drawn["own"] / sum(drawn.values()) - 3 / 8) < 0.06
