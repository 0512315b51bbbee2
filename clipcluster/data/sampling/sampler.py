"""The sampler: which sample, and which of its captions, every slot of every batch holds.

A pure function of (seed, t). It knows nothing of ranks, nodes and workers: each takes its slots of batch t,
and the whole state of the data is the number of batches drawn.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np

from clipcluster.data.sampling.caption_rounds import CaptionRounds, SamplerSource
from clipcluster.data.sampling.mixing import integer_weights, lay_out
from clipcluster.data.sampling.oversampling import ShownClasses, repeats_of
from clipcluster.data.sampling.shuffle import GroupSampler
from clipcluster.data.shards.dataset import Dataset
from clipcluster.errors import UserError
from clipcluster.recipe.sections.data import Source
from clipcluster.recipe.sections.recipe import Recipe

Draws = np.recarray
"""What n slots of a batch hold, in order of the slots: rows (n,) of `DRAW`."""

DRAW = np.dtype([("source", "i4"), ("pass_index", "i8"), ("position", "i8"), ("caption", "i4")])
"""One slot: number of the source in the recipe; pass of the source, from 0, where samples are repeated, each
copy counts as a pass (pass x `CaptionRounds.copies` + copy); sample within the source, counted in the index's
order; number of the caption shown, -1 in a source without caption counts. No two draws are equal."""


class Sampler:
    """The order of the samples of `sources`: `batch(t)` for t = 0, 1, ...

    batch_size: global, samples of one optimizer step.
    captions: "all" (a draw is a pair, a pass shows each caption), "random" or "first" (one for each sample).
    lanes: upper bound of the positions read at once; window: samples shuffled together within a lane;
    full_shuffle_below: groups with up to so many draws a pass are permuted whole.
    epoch_samples: draws of an epoch; None: one pass of every source.

    Sources without mixing weights form one group, drawn as one source, and no batch crosses a pass of it;
    with weights each is a group of its own. Raises UserError for weights whose period is too long, a source
    with nothing to draw, an epoch without a step. What is kept are the columns it was given, and little more:
    nothing grows with the number of samples but groups permuted whole.
    """

    def __init__(
        self,
        sources: Sequence[SamplerSource],
        *,
        batch_size: int,
        seed: int,
        captions: Literal["all", "random", "first"] = "first",
        lanes: int = 64,
        window: int = 1024,
        full_shuffle_below: int = 1_000_000,
        epoch_samples: int | None = None,
    ) -> None:
        self.batch_size = batch_size
        weights = [source.weight for source in sources if source.weight is not None]
        # drawn as one without weights, else each alone: a group's number is that of its first source
        groups = [[source] for source in sources] if weights else [sources]
        self.weights = integer_weights(weights) if weights else [1]
        rounds = [CaptionRounds(group, every_caption=captions == "all") for group in groups]
        for number, group in enumerate(groups):
            _require_draws(number, group, rounds[number])
        self.samples = int(sum(Fraction(int(rounds_.sizes.sum()), rounds_.factor) for rounds_ in rounds))
        self.steps_per_epoch = _steps_per_epoch(self.samples, epoch_samples, batch_size)
        self._pattern, self._ordinals = lay_out(self.weights)
        self._groups = []
        for number, rounds_ in enumerate(rounds):
            size = int(rounds_.sizes.sum())
            sampler = GroupSampler(
                rounds_,
                seed=seed,
                number=number,
                per_batch=max(1, batch_size * self.weights[number] // len(self._pattern)),
                pass_draws=size if len(groups) > 1 else _whole_batches(size, batch_size),
                lanes=lanes,
                window=window,
                full_shuffle=size <= full_shuffle_below,
                captions=captions,
            )
            self._groups.append(sampler)

    def group_of(self, source: int) -> GroupSampler:
        """The sampler of the group in which a source lies."""
        return self._groups[min(source, len(self._groups) - 1)]

    def shown_classes(self, source: int) -> ShownClasses:
        """The classes of which samples of a source are drawn; all, unless its repeats leave some out."""
        shown = self.group_of(source).rounds.shown
        return shown[min(source, len(shown) - 1)]

    def batch(self, t: int) -> Draws:
        """All slots of batch t."""
        return self.slots(t, 0, self.batch_size)

    def slots(self, t: int, start: int, stop: int) -> Draws:
        """Slots start <= slot < stop of batch t: what `batch(t)` holds there, made without the others."""
        if t < 0 or not 0 <= start <= stop <= self.batch_size:
            raise ValueError(f"no slots {start} to {stop} in batch {t} of {self.batch_size}")
        draws = np.empty(stop - start, DRAW)
        periods, phases = np.divmod(t * self.batch_size + np.arange(self.batch_size), len(self._pattern))
        for number, group in enumerate(self._groups):
            slots = np.flatnonzero(self._pattern[phases] == number)
            numbers = periods[slots] * self.weights[number] + self._ordinals[phases[slots]]
            # sorted over the whole batch, then cut: a rank keeps its lanes, whoever asks
            first, last = np.searchsorted(slots, (start, stop)).tolist()
            if first < last:
                mine = slots[first:last] - start
                passes, positions, captions = group.draws(numbers, slice(first, last))
                sources, within = group.rounds.locate(positions)
                draws["source"][mine] = sources + number
                draws["pass_index"][mine] = passes
                draws["position"][mine] = within
                draws["caption"][mine] = captions
        return draws.view(Draws)


def _require_draws(first: int, group: Sequence[SamplerSource], rounds_: CaptionRounds) -> None:
    if rounds_.sizes.sum() == 0:
        names = ", ".join(f"data.train.{i} {own.name}".strip() for i, own in enumerate(group, first))
        captions = any(own.fields for own in group)
        needed = ["a caption"] * captions + ["a repeat above zero"] * any(own.repeats for own in group)
        what = f"no sample with {' and '.join(needed)}" if needed else "no samples"
        raise UserError(
            f"{names}: {what}. Look at the shards with `clipcluster shards stats`, and at captions_in, repeat"
            " and repeat_classes."
        )


def _whole_batches(size: int, batch_size: int) -> int:
    """Draws of one pass where no batch crosses it."""
    if size < batch_size:
        raise UserError(
            f"data.batch_size is {batch_size:,} and a pass through the training data, repeats counted, is"
            f" {size:,} samples; no batch crosses a pass. Give a data.batch_size of at most {size:,}, or"
            " larger repeats."
        )
    return size - size % batch_size


def _steps_per_epoch(samples: int, epoch_samples: int | None, batch_size: int) -> int:
    wanted = samples if epoch_samples is None else epoch_samples
    if wanted >= batch_size:
        return wanted // batch_size
    what = "the training data hold" if epoch_samples is None else "data.epoch_samples is"
    remedy = "data.batch_size" if epoch_samples is None else "data.batch_size, or a larger data.epoch_samples"
    raise UserError(
        f"{what} {wanted:,} samples, less than one batch of {batch_size:,}: an epoch would have no step."
        f" Give a smaller {remedy}."
    )


def sampler_of(recipe: Recipe, datasets: Sequence[Dataset]) -> Sampler:
    """The sampler of a recipe; `datasets` are its sources as they are listed.

    Raises UserError as Sampler does, and for repeats of classes that are not known.
    """
    data = recipe.data
    return Sampler(
        [
            _sampler_source(dataset, source, f"data.train.{number}")
            for number, (dataset, source) in enumerate(zip(datasets, data.train, strict=True))
        ],
        batch_size=data.batch_size,
        seed=recipe.seed,
        captions=data.text.captions,
        lanes=data.order.lanes,
        window=data.order.window,
        full_shuffle_below=data.order.full_shuffle_below,
        epoch_samples=data.epoch_samples,
    )


def _sampler_source(dataset: Dataset, source: Source, recipe_key: str) -> SamplerSource:
    """What the sampler needs of an opened source."""
    by_class = bool(source.repeat_classes)
    return SamplerSource(
        dataset.sample_counts,
        dataset.sample_ends,
        dataset.fields,
        dataset.more_than,
        weight=source.weight,
        name=dataset.name,
        repeats=repeats_of(
            source.repeat,
            source.repeat_classes,
            classes=dataset.classes if by_class else None,
            classnames=dataset.classnames if by_class else None,
            recipe_key=recipe_key,
            name=dataset.name,
        ),
    )
