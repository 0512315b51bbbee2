"""Captions from several fields: which field, and which of its captions, by chance that can be repeated."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clipcluster.data.sampling.oversampling import Repeats
from clipcluster.data.sampling.sampler import Sampler
from clipcluster.data.shards.metadata import CaptionField
from clipcluster.errors import UserError
from tests.data.sources import captions_of, sampler_source

LENGTHS = st.integers(0, 3)


def field(counts: np.ndarray, probability: float) -> CaptionField:
    return CaptionField("default", probability, counts)


@st.composite
def shapes_with_fields(draw):
    """One or two sources drawn as one; the first has two or three caption fields."""
    shapes = []
    for fields in draw(st.sampled_from([(2,), (3,), (2, 1), (3, 2), (2, 0)])):
        sample_counts = np.array(draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
        size = int(sample_counts.sum())
        counts = [draw(hnp.arrays(np.uint8, size, elements=LENGTHS)) for _ in range(fields)]
        for column in counts:
            column[0] = 1
        repeats = draw(st.sampled_from([None, Repeats(2)]))
        if fields > 1:
            chances = draw(st.lists(st.floats(0.001, 100, allow_nan=False), min_size=fields, max_size=fields))
            both = tuple(field(column, chance) for column, chance in zip(counts, chances, strict=True))
            shapes.append(sampler_source(sample_counts, fields=both, repeats=repeats))
        else:
            shapes.append(sampler_source(sample_counts, counts[0] if fields else None, repeats=repeats))
    return shapes


@settings(max_examples=60)
@given(shapes_with_fields(), st.sampled_from(["random", "first"]), st.sampled_from([0, 1000]), st.data())
def test_a_caption_is_one_of_a_field_that_has_some(shapes, captions, whole, data):
    options = {"seed": data.draw(st.integers(0, 9)), "captions": captions, "full_shuffle_below": whole}
    sampler = Sampler(shapes, batch_size=1, lanes=4, window=4, **options)
    shown = set()
    for t in range(sampler.group_of(0).pass_draws):
        batch = sampler.batch(t)
        source, position, caption = (
            int(column[0]) for column in (batch.source, batch.position, batch.caption)
        )
        shape = shapes[source]
        shown.add((source, position))
        if not shape.fields:
            counts = [] if captions_of(shape) is None else [int(captions_of(shape)[position])]
        else:
            counts = [int(field.counts[position]) for field in shape.fields]
        firsts = np.cumsum([0, *counts[:-1]]).tolist()
        if not counts:
            assert caption == -1
        elif captions == "first":
            assert caption in {first for first, count in zip(firsts, counts, strict=True) if count}
        else:
            assert 0 <= caption < sum(counts)
    everything = set()
    for number, shape in enumerate(shapes):
        counts = np.ones(int(shape.sample_counts.sum()), dtype=int)
        if shape.fields:
            counts = np.sum([field.counts for field in shape.fields], axis=0, dtype=int)
        elif captions_of(shape) is not None:
            counts = captions_of(shape)
        everything |= {(number, place) for place in np.flatnonzero(counts).tolist()}
    assert shown == everything  # a sample without a caption in any field is never drawn
    size = min(len(everything), 7)
    several = Sampler(shapes, batch_size=size, lanes=4, window=4, **options)
    start, stop = sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size))))
    part = several.slots(3, start, stop)
    assert part.caption.tolist() == several.batch(3).caption[start:stop].tolist()


@pytest.mark.parametrize("full_shuffle_below", [0, 10**6])
@pytest.mark.parametrize("chances", [(0.5, 0.5), (0.7, 0.2, 0.1), (3.0, 1.0)])
def test_fields_are_drawn_by_their_probabilities(full_shuffle_below, chances):
    fields = tuple(field(np.full(20_000, 2, dtype=np.uint8), chance) for chance in chances)
    shape = sampler_source(np.full(200, 100), fields=fields)
    sampler = Sampler(
        [shape], batch_size=1000, seed=4, captions="random", lanes=20, window=32,
        full_shuffle_below=full_shuffle_below,
    )  # fmt: skip
    passes = [np.concatenate([sampler.batch(20 * p + t).caption for t in range(20)]) for p in range(2)]
    for captions in passes:
        for number, chance in enumerate(np.array(chances) / sum(chances)):
            deviation = np.sqrt(20_000 * chance * (1 - chance))
            assert abs(np.sum(captions // 2 == number) - 20_000 * chance) < 4.5 * deviation
        assert abs(np.sum(captions % 2) - 10_000) < 4.5 * np.sqrt(5_000)


def test_fields_without_a_caption_of_the_sample_are_left_to_the_others():
    kinds = np.arange(40_000) % 4  # no caption, only the first, only the last, all
    counts = [np.where(np.isin(kinds, own), 1, 0).astype(np.uint8) for own in ((1, 3), (3,), (2, 3))]
    fields = tuple(field(column, chance) for column, chance in zip(counts, (0.1, 0.6, 0.3), strict=True))
    sampler = Sampler(
        [sampler_source(np.full(40, 1000), fields=fields)], batch_size=1000, seed=0, captions="first"
    )
    assert sampler.samples == 30_000
    draws = [sampler.batch(t) for t in range(30)]
    positions = np.concatenate([batch.position for batch in draws])
    captions = np.concatenate([batch.caption for batch in draws])
    assert set(kinds[positions].tolist()) == {1, 2, 3}
    assert not captions[np.isin(kinds[positions], (1, 2))].any()  # the only one is number 0
    of_all = np.bincount(captions[kinds[positions] == 3], minlength=3)
    assert np.all(np.abs(of_all - np.array([1000, 6000, 3000])) < 4.5 * np.sqrt(10_000 * 0.24))


def test_each_pass_and_copy_draws_another_field():
    fields = (
        field(np.ones(4000, dtype=np.uint8), 1.0),
        field(np.ones(4000, dtype=np.uint8), 1.0),
    )
    shape = sampler_source(np.full(40, 100), fields=fields, repeats=Repeats(2))
    sampler = Sampler([shape], batch_size=100, seed=0, captions="random")
    shown = np.full((4, 4000), -1)  # pass x copies + copy
    for t in range(2 * sampler.steps_per_epoch):
        batch = sampler.batch(t)
        shown[batch.pass_index, batch.position] = batch.caption
    assert set(shown.ravel().tolist()) == {0, 1}
    for one in range(4):
        for other in range(one):
            assert abs(np.mean(shown[one] == shown[other]) - 0.5) < 0.04


def test_the_draws_never_change_from_one_version_to_the_next():
    counts = (np.arange(1500) * 7 % 4).astype(np.uint8)
    classes = (np.arange(1500) % 5).astype(np.int32)
    shape = sampler_source(
        np.full(15, 100), fields=(field(counts, 0.3), field(counts[::-1], 0.7)),
        repeats=Repeats(1, {2: 3, 4: 0.5}, classes),
    )  # fmt: skip
    hashed = hashlib.blake2b(digest_size=8)
    for below in (0, 10**6):
        sampler = Sampler(
            [shape], batch_size=48, seed=5, captions="random", lanes=8, window=16, full_shuffle_below=below
        )
        for t in (0, 30, 31, 1_000_000):
            draws = sampler.batch(t)
            for column in (draws.pass_index, draws.position, draws.caption):
                hashed.update(column.astype("<i8").tobytes())
    assert hashed.hexdigest() == "5451a50086cd393a"


def test_one_field_alone_is_what_caption_counts_are():
    counts = (np.arange(900) % 4).astype(np.uint8)
    options = {"batch_size": 30, "seed": 1, "captions": "all", "lanes": 5, "full_shuffle_below": 0}
    told = Sampler([sampler_source(np.full(9, 100), fields=(field(counts, 0.2),))], **options)
    plain = Sampler([sampler_source(np.full(9, 100), counts)], **options)
    for t in (0, 3, 44, 46):
        assert told.batch(t).position.tolist() == plain.batch(t).position.tolist()
        assert told.batch(t).caption.tolist() == plain.batch(t).caption.tolist()


def test_samples_counted_beforehand_are_not_counted_again():
    class Guarded:
        """Caption counts of which no stretch may be read."""

        def __init__(self, counts: np.ndarray) -> None:
            self.counts = counts

        def __len__(self) -> int:
            return len(self.counts)

        def __getitem__(self, key: object) -> np.ndarray:
            assert isinstance(key, np.ndarray), "a scan"
            return self.counts[key]

    columns = [Guarded(np.ones(4000, dtype=np.uint8)), Guarded(np.zeros(4000, dtype=np.uint8))]
    shape = sampler_source(
        np.full(40, 100), more_than=np.full((1, 40), 100),
        fields=tuple(field(column, 0.5) for column in columns), repeats=Repeats(3),  # type: ignore[arg-type]
    )  # fmt: skip
    sampler = Sampler([shape], batch_size=100, seed=0, captions="random", full_shuffle_below=0)
    assert sampler.samples == 12_000
    assert not sampler.batch(5).caption.any()


def test_a_source_without_a_caption_in_any_field_is_refused():
    bare = tuple(field(np.zeros(9, dtype=np.uint8), 1.0) for _ in range(2))
    with pytest.raises(UserError, match=r"data\.train\.0: no sample with a caption\. "):
        Sampler([sampler_source(np.array([9]), fields=bare)], batch_size=3, seed=0, captions="random")
