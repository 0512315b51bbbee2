"""Over- and under-sampling: how often a pass shows each sample, and how its copies are spread."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clipcluster.data.sampling import caption_rounds as rounds_module
from clipcluster.data.sampling import shuffle as line_module
from clipcluster.data.sampling.caption_rounds import CaptionRounds
from clipcluster.data.sampling.oversampling import Repeats
from clipcluster.data.sampling.sampler import Sampler, SamplerSource
from clipcluster.errors import UserError
from tests.data.sources import captions_of, sampler_source

CHOICES = st.sampled_from([0, 0.25, 0.5, 1, 1.5, 2, 3])


@st.composite
def repeats(draw, n_samples):
    every = draw(CHOICES)
    if draw(st.booleans()):
        return Repeats(every)
    classes = draw(hnp.arrays(np.int32, n_samples, elements=st.integers(-1, 5)))
    return Repeats(every, draw(st.dictionaries(st.integers(0, 4), CHOICES, max_size=4)), classes)


@st.composite
def source(draw, weight=None):
    sample_counts = np.array(draw(st.lists(st.integers(0, 9), min_size=1, max_size=6)), dtype=np.int64)
    sample_counts[0] += 2
    captions = draw(hnp.arrays(np.uint8, int(sample_counts.sum()), elements=st.integers(0, 3)))
    own = draw(repeats(len(captions)))
    captions[:2] = 1  # something to draw
    if own.classes is not None:
        own.classes[:2] = 5
    if own.every == 0:
        own = Repeats(1.0, own.by_class, own.classes)
    return sampler_source(sample_counts, captions if draw(st.booleans()) else None, weight, repeats=own)


def written(shape: SamplerSource) -> list[Fraction]:
    """Each sample's repeats as they are written."""
    own = shape.repeats or Repeats()
    n_samples = int(np.sum(shape.sample_counts))
    classes = [-1] * n_samples if own.classes is None else own.classes.tolist()
    return [Fraction(own.by_class.get(number, own.every)) for number in classes]


def expected_pass(shapes, factor, captions):
    """How often one whole pass shows every (source, position, caption if all)."""
    things: Counter = Counter()
    for number, shape in enumerate(shapes):
        for position, times in enumerate(written(shape)):
            count = 1 if captions_of(shape) is None else int(captions_of(shape)[position])
            for caption in range(count) if captions == "all" else range(min(count, 1)):
                things[number, position, caption] += int(times * factor)
    return +things


def factor_of(shapes) -> int:
    values = {times for shape in shapes for times in written(shape)}
    values |= {
        Fraction(value)
        for shape in shapes
        if shape.repeats
        for value in (shape.repeats.every, *shape.repeats.by_class.values())
    }
    return int(np.lcm.reduce([value.denominator for value in values]))


def drawn(draws, captions):
    columns = (draws.source, draws.pass_index, draws.position, draws.caption)
    for source, pass_index, position, caption in zip(*(column.tolist() for column in columns), strict=True):
        yield pass_index, (source, position, max(caption, 0) if captions == "all" else 0)


@settings(max_examples=60)
@given(st.lists(source(), min_size=1, max_size=3), st.sampled_from([1, 7, 1 << 22]))
def test_every_copy_of_a_sample_lies_in_a_portion_of_its_own(shapes, scan):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds_module, "_SCAN", scan)  # small: every boundary of a scan is met
        rounds = CaptionRounds(shapes, every_caption=True)
    assert rounds.factor == factor_of(shapes)
    everything = expected_pass(shapes, rounds.factor, "all")
    portions = np.arange(rounds.n_portions)
    found: Counter = Counter()
    for round_index in range(len(rounds.sizes)):
        counts = rounds.counts(round_index, portions)
        assert counts.sum() == rounds.sizes[round_index]
        rows = np.repeat(portions, counts)
        numbers = np.concatenate([np.arange(count) for count in counts.tolist()])
        mixed = np.random.default_rng(0).permutation(len(rows))
        positions, copies = rounds.samples(round_index, rows[mixed], numbers[mixed])
        whole, whole_copies = rounds.all_samples(round_index)
        pairs = sorted(zip(positions.tolist(), copies.tolist(), strict=True))
        assert pairs == sorted(zip(whole.tolist(), whole_copies.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        sources, within = rounds.locate(positions)
        found.update((s, p, round_index) for s, p in zip(sources.tolist(), within.tolist(), strict=True))
    assert found == everything


@settings(max_examples=40)
@given(
    st.tuples(source(3.0), source(1.0)),
    st.sampled_from(["all", "random", "first"]),
    st.sampled_from([0, 1000]),
    st.data(),
)
def test_a_pass_shows_every_sample_exactly_its_repeats_times(shapes, captions, whole, data):
    options = {
        "batch_size": data.draw(st.integers(1, 20)),
        "seed": data.draw(st.integers(0, 2**32)),
        "captions": captions,
        "lanes": data.draw(st.integers(1, 6)),
        "window": data.draw(st.integers(1, 9)),
        "full_shuffle_below": whole,
        "epoch_samples": 20,
    }
    sampler = Sampler(shapes, **options)
    passes: dict[tuple[int, int], Counter] = {}
    shown: Counter = Counter()
    for t in range(300 // options["batch_size"]):
        batch = sampler.batch(t)
        for pass_index, thing in drawn(batch, captions):
            passes.setdefault((thing[0], pass_index // sampler.group_of(thing[0]).rounds.copies), Counter())[
                thing
            ] += 1
            shown[pass_index, thing] += 1
    assert set(shown.values()) == {1}  # no two draws with the same augmentation
    for (number, pass_index), things in passes.items():
        line = [sampler_source(np.zeros(1))] * number + [shapes[number]]
        everything = expected_pass(line, factor_of([shapes[number]]), captions)
        assert everything.total() == sampler.group_of(number).pass_draws
        assert all(times <= everything[thing] for thing, times in things.items())
        if (number, pass_index + 1) in passes:
            assert things == everything
    t = data.draw(st.integers(0, 300))
    start = data.draw(st.integers(0, options["batch_size"]))
    stop = data.draw(st.integers(start, options["batch_size"]))
    part = list(drawn(Sampler(shapes, **options).slots(t, start, stop), captions))
    assert part == list(drawn(sampler.batch(t), captions))[start:stop]


@pytest.mark.parametrize("full_shuffle_below", [0, 10**6])
@pytest.mark.parametrize("captions", ["all", "first"])
def test_one_line_shows_no_sample_more_often_and_over_several_passes_all(captions, full_shuffle_below):
    generator = np.random.default_rng(0)
    shapes = [
        sampler_source(np.full(9, 31), generator.integers(1, 3, 279).astype(np.uint8),
                    repeats=Repeats(1, {0: 4, 1: 0, 2: 0.5}, generator.integers(-1, 4, 279))),
        sampler_source(np.full(4, 20), repeats=Repeats(0.5)),
    ]  # fmt: skip
    sampler = Sampler(
        shapes, batch_size=48, seed=2, captions=captions, lanes=8, window=8,
        full_shuffle_below=full_shuffle_below,
    )  # fmt: skip
    everything = expected_pass(shapes, 2, captions)
    steps = everything.total() // 48
    assert sampler.group_of(0).rounds.copies == sampler.group_of(1).rounds.copies == 8
    assert sampler.samples == everything.total() // 2
    assert sampler.steps_per_epoch == everything.total() // 2 // 48
    assert sampler.group_of(0).pass_draws == steps * 48
    missed: Counter = Counter()
    for pass_index in range(6):
        shown: Counter = Counter()
        for t in range(pass_index * steps, (pass_index + 1) * steps):
            things = list(drawn(sampler.batch(t), captions))
            assert {copy // 8 for copy, _ in things} == {pass_index}
            shown.update(thing for _, thing in things)
        assert shown <= everything
        missed += everything - shown
    assert missed.total() == 6 * (everything.total() % 48)
    assert all(missed[thing] < 6 * times for thing, times in everything.items())


def test_an_epoch_keeps_the_length_that_is_written_though_a_pass_is_longer():
    classes = np.array([0] * 60 + [1] * 20)
    for own, samples, a_pass in (
        (Repeats(3), 240, 240),
        (Repeats(0.5), 40, 80),
        (Repeats(1, {1: 0.5}, classes), 70, 140),
        (Repeats(1.5, {1: 1 / 3}, classes), 96, 580),
        (Repeats(0, {1: 2}, classes), 40, 40),
        (Repeats(1, {1: 0}, classes), 60, 60),
    ):
        sampler = Sampler([sampler_source(np.full(8, 10), repeats=own)], batch_size=10, seed=0)
        assert (sampler.samples, sampler.steps_per_epoch) == (samples, samples // 10)
        assert sampler.group_of(0).pass_draws == a_pass // 10 * 10


def over_sampled(share: float, times: int, shards: int = 64, per_shard: int = 1000) -> tuple:
    classes = (np.random.default_rng(5).random(shards * per_shard) < share).astype(np.int32)
    shape = sampler_source(np.full(shards, per_shard), repeats=Repeats(1, {1: times}, classes))
    return shape, classes


@pytest.mark.parametrize("full_shuffle_below", [0, 10**6])
@pytest.mark.parametrize("lanes", [4, 32])
def test_an_over_sampled_class_is_spread_over_all_batches(full_shuffle_below, lanes):
    shape, classes = over_sampled(0.05, 20)
    sampler = Sampler(
        [shape], batch_size=128, seed=0, lanes=lanes, window=256, full_shuffle_below=full_shuffle_below
    )
    of_class = classes.sum() * 20 / (classes.sum() * 19 + len(classes))
    shares = [classes[sampler.batch(t).position].mean() for t in range(sampler.steps_per_epoch)]
    assert abs(np.mean(shares) - of_class) < 0.001
    # by chance a batch's share has this deviation; lanes that ran through one class would be far beyond
    by_chance = np.sqrt(of_class * (1 - of_class) / 128)
    assert np.std(shares) < 1.1 * by_chance
    assert max(abs(share - of_class) for share in shares) < 5 * by_chance


@pytest.mark.parametrize("full_shuffle_below", [0, 10**7])
@pytest.mark.parametrize("shards", [128, 131])
def test_copies_of_a_sample_are_spread_over_the_pass_and_meet_by_chance_alone(shards, full_shuffle_below):
    # 128: shards end together in all lanes, so that their portions would meet sample by sample
    shape = sampler_source(np.full(shards, 250), repeats=Repeats(4))
    met, expected = 0, 0.0
    for seed in range(2):
        sampler = Sampler(
            [shape], batch_size=64, seed=seed, lanes=16, window=64, full_shuffle_below=full_shuffle_below
        )
        steps = sampler.steps_per_epoch
        batches = [sampler.batch(t).position for t in range(steps)]
        met += sum(64 - len(np.unique(batch)) for batch in batches)
        # every sample has 6 pairs of copies, each in one batch by chance once in `steps` batches
        expected += shards * 250 * 6 / steps
    assert 0.6 * expected < met < 1.4 * expected
    if shards == 128:  # all copies of the pass are drawn, none is left over
        drawn_at = np.argsort(np.concatenate(batches), kind="stable").reshape(-1, 4) / (steps * 64)
        drawn_at.sort(axis=1)
        # four places at random are 3/5 apart
        assert abs(np.mean(drawn_at[:, 3] - drawn_at[:, 0]) - 0.6) < 0.05


def test_rounds_hold_every_caption_as_often_as_its_sample_is_repeated():
    counts = np.array([1, 3, 2, 3, 0], dtype=np.uint8)
    shape = sampler_source(np.array([3, 2]), counts, repeats=Repeats(2, {7: 1}, np.array([0, 7, 0, 0, 0])))
    rounds = CaptionRounds([shape], every_caption=True)
    assert rounds.sizes.tolist() == [2 + 1 + 2 + 2, 1 + 2 + 2, 1 + 2]
    told = sampler_source(
        shape.sample_counts, counts, repeats=shape.repeats, more_than=np.array([[3, 1], [2, 1], [1, 1]])
    )
    assert CaptionRounds([told], every_caption=True).sizes.tolist() == rounds.sizes.tolist()
    assert CaptionRounds([told], every_caption=False).sizes.tolist() == [7]


def test_few_captions_stand_beside_a_sample_with_more_than_a_byte_can_count():
    few = sampler_source(
        np.array([4]), np.array([1, 2, 3, 1], np.uint8), repeats=Repeats(1, {0: 2}, np.array([0, 1, 0, 1]))
    )
    many = sampler_source(np.array([2]), np.array([300, 2], np.int32))
    sizes = CaptionRounds([few, many], every_caption=True).sizes
    assert (sizes[0], sizes[1], sizes[2], sizes[3], len(sizes)) == (6 + 2, 3 + 2, 2 + 1, 1, 300)


def test_a_line_of_many_portions_finds_the_same_samples(monkeypatch):
    shape, _ = over_sampled(0.3, 3, shards=41, per_shard=50)
    shape.sample_counts[7:9] = 0
    shape = sampler_source(shape.sample_counts, repeats=Repeats(1, {1: 3}, shape.repeats.classes[:1950]))
    options = {"batch_size": 32, "seed": 0, "lanes": 8, "window": 8, "full_shuffle_below": 0}
    plain = Sampler([shape], **options)
    monkeypatch.setattr(line_module, "_MANY", 10)
    many = Sampler([shape], **options)
    for t in range(2 * plain.steps_per_epoch):
        assert list(drawn(many.batch(t), "first")) == list(drawn(plain.batch(t), "first"))


def test_errors_are_named():
    classes = np.zeros(80, dtype=np.int32)

    def sampler(*repeats, batch_size=4):
        shapes = [sampler_source(np.array([80]), repeats=own, name="flickr") for own in repeats]
        return Sampler(shapes, batch_size=batch_size, seed=0)

    with pytest.raises(
        UserError, match=r"repeats 1, 0\.37 are whole only when multiplied by 100;.* at most 64"
    ):
        sampler(Repeats(1, {0: 0.37}, classes, recipe_key="data.train.0"))
    with pytest.raises(
        UserError, match=r"data\.train\.0, data\.train\.1: the repeats 0\.14285714, 0\.090909091"
    ):
        sampler(Repeats(1 / 7, recipe_key="data.train.0"), Repeats(1 / 11, recipe_key="data.train.1"))
    with pytest.raises(
        UserError, match=r"some samples 320 times \(a repeat of 5, times 64 to make all whole\)"
    ):
        sampler(Repeats(5, {0: 1 / 64}, classes))
    with pytest.raises(UserError, match=r"300 times .*; at most 255"):
        sampler(Repeats(300))
    with pytest.raises(UserError, match=r"flickr: no sample with a repeat above zero.*repeat_classes"):
        sampler(Repeats(0))
    with pytest.raises(UserError, match=r"a pass through the training data, repeats counted, is 160 samples"):
        Sampler(
            [sampler_source(np.array([80]), repeats=Repeats(2))], batch_size=161, seed=0, epoch_samples=999
        )
    with pytest.raises(UserError, match=r"the repeats of flickr show 200,000 shards up to 200 times a pass"):
        Sampler([sampler_source(np.ones(200_000), name="flickr", repeats=Repeats(200))], batch_size=4, seed=0)


def test_the_nearest_repeats_that_are_named_will_do():
    classes = np.zeros(80, dtype=np.int32)
    for value in (0.37, 1.2345, 0.001, 2.718281):
        shape = sampler_source(np.array([80]), repeats=Repeats(1, {0: value}, classes))
        with pytest.raises(UserError) as caught:
            Sampler([shape], batch_size=1, seed=0)
        every, nearest = str(caught.value).rsplit("possible repeats are ", 1)[1].rstrip(".").split(", ")
        told = sampler_source(np.array([80]), repeats=Repeats(float(every), {0: float(nearest)}, classes))
        assert Sampler([told], batch_size=1, seed=0).steps_per_epoch >= 1
        assert float(nearest) == pytest.approx(value, rel=0.02 if value > 0.1 else 20)
