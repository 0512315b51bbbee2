"""Checkpoint rotation: which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from clipcluster.recipe.sections.checkpoint import Keep


def kept(
    keep: Keep, every: int | None, steps: Iterable[int], values: Mapping[int, float], pinned: Iterable[int]
) -> set[int]:
    """The steps out of `steps` whose checkpoints stay: the last, one in `every` steps, the best, the pinned.

    values: the metric of `keep.best` at the steps where it was measured.
    """
    ordered = sorted(steps)
    stay = {*ordered[-keep.last :], *pinned}
    if every:
        stay |= {step for step in ordered if step and step % every == 0}
    if keep.best:
        sign = 1.0 if smaller_is_better(keep.best.metric) else -1.0
        ranked = sorted(values, key=lambda step: (sign * values[step], step))
        stay |= set(ranked[: keep.best.count])
    return stay


def smaller_is_better(metric: str) -> bool:
    """Whether a metric is a rank, a loss or an error (`val/t2i_mean_rank`); all others are better large."""
    return metric.endswith(("rank", "loss", "error"))
