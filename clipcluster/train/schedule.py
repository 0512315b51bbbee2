"""The learning rate and the weight decay as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Schedule = Callable[[int], float]
"""From the step to the learning rate, or to another number."""


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup: int,
    total: int,
    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine",
    minimum: float = 0.0,
    cooldown: int = 0,
) -> float:
    """The learning rate of the update that leads from step `step` to `step + 1` (steps count from 0).

    The warm-up is linear and never zero: `peak * (step + 1) / warmup` for `step < warmup` (Goyal et al. 2017,
    section 2.2). Then, with `done` rising linearly from 0 at the first step of the named interval to 1 at
    `total`, which is one step past the last update:

    - constant: `peak`;
    - cosine: `minimum + (peak - minimum) * (1 + cos(pi * done)) / 2` from the warm-up to `total` (Loshchilov
      and Hutter 2017, equation 5, one cycle);
    - linear: `peak + (minimum - peak) * done` from the warm-up to `total`;
    - wsd: `peak`, then the line over the last `cooldown` steps (Zhai et al. 2022, section 3.5: training at a
      constant rate, then a linear cooldown).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if name == "constant":
        return peak
    begin = max(warmup, total - cooldown) if name == "wsd" else warmup
    done = min(1.0, max(0, step - begin) / max(1, total - begin))
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if name == "cosine" else 1.0 - done
    return minimum + (peak - minimum) * left


def weight_decay(step: int, *, start: float, end: float, total: int) -> float:
    """The weight decay of the update that leads from step `step` to `step + 1`.

    Half a cosine from `start` at step 0 to `end` at `total`: `end + (start - end) * (1 + cos(pi * step /
    total)) / 2`, as in the code of DINO (Caron et al. 2021) and ConvNeXt (Liu et al. 2022).
    """
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total)))
