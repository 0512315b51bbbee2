"""Which checkpoints are kept: a pure function of those that exist."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """The policy: the last N, every K steps, the best by a metric."""

    last: int = 3
    """At least 2: the newest may be the one that turns out broken."""
    every: int | None = None
    """Steps."""
    metric: str | None = None
    count: int = 0

    def __post_init__(self) -> None:
        if self.last < 2:
            raise ValueError(f"keep.last is {self.last}; keep at least 2, the newest may turn out broken")

    def chosen(
        self, steps: Collection[int], values: Mapping[int, float], pinned: Collection[int] = ()
    ) -> set[int]:
        """The steps that are kept, out of `steps`; `values` are the metric's, for the steps that have one."""
        ordered = sorted(steps)
        stay = set(ordered[-self.last :]) | (set(pinned) & set(ordered))
        if self.every:
            stay |= {step for step in ordered if step and step % self.every == 0}
        if self.metric and self.count:
            sign = 1.0 if smaller_is_better(self.metric) else -1.0
            known = [step for step in ordered if values.get(step) == values.get(step, 0.0)]  # NaN is no value
            ranked = sorted((s for s in known if s in values), key=lambda s: (sign * values[s], s))
            stay |= set(ranked[: self.count])
        return stay


def smaller_is_better(metric: str) -> bool:
    """Ranks, losses and errors are better small (`val/t2i_mean_rank`); everything else is better large."""
    return metric.endswith(("rank", "loss", "error"))
