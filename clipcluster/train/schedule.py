"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Schedule = Callable[[int], float]
ScheduleName = Literal["cosine", "constant"]


def learning_rate(step: int, *, peak: float, warmup: int, total: int, name: ScheduleName = "cosine") -> float:
    """The learning rate of the update that leads from step `step` to `step + 1` (steps count from 0).

    Warm-up is linear and never zero: `peak * (step + 1) / warmup` for `step < warmup`. After it
    `constant` stays at `peak`, and `cosine` falls from `peak` (at `step == warmup`) along half a cosine,
    `peak * (1 + cos(pi * (step - warmup) / (total - warmup))) / 2`, which reaches 0 at `step == total`,
    one update past the last (Loshchilov and Hutter 2017, equation 5, one cycle with minimum 0).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if name == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * peak * (1.0 + math.cos(math.pi * done))


def make_schedule(name: ScheduleName, *, peak: float, warmup: int, total: int) -> Schedule:
    """The schedule of a run: a function from step to learning rate."""
    return lambda step: learning_rate(step, peak=peak, warmup=warmup, total=total, name=name)
