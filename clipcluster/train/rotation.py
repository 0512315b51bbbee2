"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from clipcluster.recipe.sections.checkpoint import Keep


def kept(
    keep: Keep, every: int | None, steps: Iterable[int], values: Mapping[int, float], pinned: Iterable[int]
) -> set[int]:
    """The steps out of `steps` that stay: the last, one in `every` steps, the best, and those `pinned`.

    `values` are those of the metric of `keep.best`, for the steps that have one.
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
    """Ranks, losses and errors are better small (`val/t2i_mean_rank`); everything else is better large."""
    return metric.endswith(("rank", "loss", "error"))
