"""The recipe's `freeze` in optimizer steps: which layers of a tower train from when on. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from clipcluster.errors import UserError
from clipcluster.recipe.sections.freeze import Freeze
from clipcluster.recipe.units import Duration
from clipcluster.text import counted

if TYPE_CHECKING:
    from clipcluster.recipe.sections.recipe import Recipe


@dataclass(frozen=True)
class Freezing:
    """An entry of `freeze` with its durations in steps.

    place: its path in the recipe, `freeze.0`. step: when it begins. layers: how many last layers train;
    None: all. The others are as in `clipcluster.recipe.sections.freeze.Freeze`.
    """

    place: str
    tower: Literal["image", "text"]
    step: int
    layers: int | None
    lr_scale: float
    warmup: int
    moving_statistics: bool
    norms_train: bool

    def __str__(self) -> str:
        return f"{self.place} ({self.summary})"

    @property
    def summary(self) -> str:
        """The entry without its key: ``text: last 6 from step 4,623``."""
        what = {None: "all", 0: "none"}.get(self.layers, f"last {self.layers}")
        return f"{self.tower}: {what} from step {self.step:,}"

    @property
    def what(self) -> tuple[int | None, bool, bool]:
        """The state of the tower under the entry, apart from its beginning and the rates."""
        return self.layers, self.moving_statistics, self.norms_train


def freezings(recipe: Recipe, steps_per_epoch: int, total_steps: int) -> tuple[Freezing, ...]:
    """The entries of `freeze`, each tower's in the order of their steps.

    Raises UserError for an entry that begins past the run's end or warms up until then, for two of one tower
    at the same step, for one that changes nothing, and for a tower that is frozen before it has ever trained
    and has no weights.
    """

    def entry(number: int, given: Freeze) -> Freezing:
        def steps(duration: Duration) -> int:
            return duration.steps(steps_per_epoch, recipe.data.batch_size, total_steps)

        kind, _, count = given.trainable.partition(" ")
        return Freezing(
            f"freeze.{number}",
            given.tower,
            steps(given.at),
            {"none": 0, "all": None}.get(kind, int(count or 0)),
            given.lr_scale,
            steps(given.warmup),
            given.batch_norm == "moving",
            given.norms == "trainable",
        )

    found = [entry(number, given) for number, given in enumerate(recipe.freeze)]
    found.sort(key=lambda freezing: (freezing.tower, freezing.step))
    for tower in dict.fromkeys(freezing.tower for freezing in found):
        own = [freezing for freezing in found if freezing.tower == tower]
        _check(own, total_steps)
        if own[0].step == 0 and own[0].layers is not None and not recipe.model.weights_of(own[0].tower):
            raise UserError(
                f"{own[0]} freezes layers that were never trained: model.{tower} has no weights, so they "
                f"would stay random. Set model.{tower}.weights, or let the tower train first"
            )
    return tuple(found)


def _check(own: Sequence[Freezing], total_steps: int) -> None:
    """UserError where an entry of a tower does not fit the one before it or the length of the run."""
    before = Freezing("", own[0].tower, -1, None, 1.0, 0, False, False)  # everything trains
    for freezing in own:
        if freezing.step >= total_steps:
            raise UserError(
                f"{freezing} begins after the run's end: the run has {counted(total_steps, 'step')}; set "
                f"{freezing.place}.at earlier, or train longer"
            )
        if freezing.step + freezing.warmup > total_steps:
            raise UserError(
                f"{freezing} would still warm up at the run's end: its warm-up takes "
                f"{counted(freezing.warmup, 'step')}, after it the run has "
                f"{counted(total_steps - freezing.step, 'step')}; shorten {freezing.place}.warmup, or train "
                "longer"
            )
        if freezing.step == before.step:
            raise UserError(f"{before} and {freezing} begin at the same step; remove one of them")
        slow = freezing.step == 0 and (freezing.lr_scale != 1 or freezing.warmup)
        if freezing.what == before.what and not slow:
            same = f"as {before}" if before.place else "as without it"
            raise UserError(
                f"{freezing} changes nothing: the tower trains {same} (lr_scale and warmup are for layers "
                "that begin to train); remove it"
            )
        before = freezing
