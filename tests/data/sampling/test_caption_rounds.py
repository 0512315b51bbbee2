from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clipcluster.data.sampling import caption_rounds as rounds_module
from clipcluster.data.sampling.caption_rounds import CaptionRounds
from tests.data.sources import captions_of, sampler_source


@st.composite
def shapes(draw, most_captions=6):
    sample_counts = np.array(draw(st.lists(st.integers(0, 9), min_size=1, max_size=12)), dtype=np.int64)
    captions = st.integers(0, most_captions)
    caption_counts = draw(hnp.arrays(np.uint8, int(sample_counts.sum()), elements=captions))
    return sampler_source(sample_counts, draw(st.sampled_from([None, caption_counts, caption_counts])))


def counts_of(rounds, round_index):
    return rounds.counts(round_index, np.arange(rounds.n_portions)).tolist()


def samples_by_shard(shape, round_index):
    counts = captions_of(shape)
    if counts is None:
        counts = np.ones(shape.sample_counts.sum(), dtype=int)
    bounds = np.concatenate([[0], np.cumsum(shape.sample_counts)])
    return [[place for place in range(a, b) if counts[place] > round_index] for a, b in pairwise(bounds)]


@settings(deadline=None)
@given(st.lists(shapes(), min_size=1, max_size=3), st.sampled_from([1, 7, 1 << 22]))
def test_rounds_hold_the_samples_with_more_captions_than_their_number(given_shapes, scan):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds_module, "_SCAN", scan)  # small: every boundary of a scan is met
        rounds = CaptionRounds(given_shapes, every_caption=True)
    starts = np.cumsum([0] + [int(shape.sample_counts.sum()) for shape in given_shapes])
    for round_index in range(len(rounds.sizes)):
        by_shard = [
            [place + start for place in shard]
            for shape, start in zip(given_shapes, starts, strict=False)
            for shard in samples_by_shard(shape, round_index)
        ]
        assert counts_of(rounds, round_index) == [len(shard) for shard in by_shard]
        everything, copies = rounds.all_samples(round_index)
        assert everything.tolist() == [place for shard in by_shard for place in shard]
        assert not copies.any()
        shards = np.array([n for n, shard in enumerate(by_shard) for _ in shard], dtype=int)
        indices = np.array([j for shard in by_shard for j in range(len(shard))], dtype=int)
        mixed = np.random.default_rng(0).permutation(len(shards))
        found, copies = rounds.samples(round_index, shards[mixed], indices[mixed])
        assert found.tolist() == everything[mixed].tolist()
        assert not copies.any()
        assert rounds.sizes[round_index] == len(everything)


@settings(deadline=None)
@given(shapes())
def test_one_round_of_the_samples_with_a_caption(shape):
    rounds = CaptionRounds([shape], every_caption=False)
    assert counts_of(rounds, 0) == [len(shard) for shard in samples_by_shard(shape, 0)]
    assert len(rounds.sizes) == 1


@settings(deadline=None)
@given(st.lists(shapes(), min_size=1, max_size=3))
def test_a_position_belongs_to_one_source(given_shapes):
    rounds = CaptionRounds(given_shapes, every_caption=True)
    sizes = [int(shape.sample_counts.sum()) for shape in given_shapes]
    sources, within = rounds.locate(np.arange(sum(sizes)))
    assert sources.tolist() == [n for n, size in enumerate(sizes) for _ in range(size)]
    assert within.tolist() == [place for size in sizes for place in range(size)]
    known = rounds.captions_at(np.arange(sum(sizes)))
    for number, shape in enumerate(given_shapes):
        expected = -1 if captions_of(shape) is None else captions_of(shape)
        assert np.all(known[sources == number, 0] == expected)


def test_what_is_kept_of_partly_captioned_shards_is_bounded(monkeypatch):
    monkeypatch.setattr(rounds_module, "_KEPT", 50)
    shape = sampler_source(np.full(20, 10), np.tile([0, 1], 100).astype(np.uint8))
    rounds = CaptionRounds([shape], every_caption=False)
    shards = np.arange(20)
    for _ in range(2):
        assert rounds.samples(0, shards, np.full(20, 2))[0].tolist() == (shards * 10 + 5).tolist()
    assert rounds._held.cache_info().currsize == 5  # numbers of 10 samples each
