"""Stages: what trains, and how fast, as a function of the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from clipcluster.train.optimizer import Optimizer, Rate, full_rate
from clipcluster.train.wrapping import WrappedTask


@dataclass(frozen=True)
class Stage:
    """What trains from step `start` on.

    rate_of: parameter name -> its rate, or None where it is frozen.
    """

    start: int = 0
    rate_of: Callable[[str], Rate | None] = full_rate


class Stages:
    """The stages of a run; the one in force follows from the step alone, at a resume too.

    A frozen parameter has no gradient (None: zero would let weight decay move it). What a tower holds fixed
    itself (sinusoidal positions) trains in no stage.
    """

    def __init__(
        self, model: nn.Module, task: WrappedTask, optimizer: Optimizer, stages: Sequence[Stage] = (Stage(),)
    ) -> None:
        """Raises ValueError unless the stages begin with step 0, in rising order."""
        starts = [stage.start for stage in stages]
        if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(f"stages begin at rising steps, the first at 0, not at {starts}")
        self._task, self._optimizer, self._stages = task, optimizer, tuple(stages)
        self._current: Stage | None = None
        self._trainable = [pair for pair in model.named_parameters() if pair[1].requires_grad]

    def enter(self, step: int) -> None:
        """Put the stage of `step` in force. Called before a checkpoint of it is loaded.

        A change wraps the task again, so that a rehearsal has to follow.
        """
        stage = [stage for stage in self._stages if stage.start <= step][-1]
        if stage is self._current:
            return
        for name, parameter in self._trainable:
            parameter.requires_grad_(stage.rate_of(name) is not None)
            if not parameter.requires_grad:
                parameter.grad = None
        self._optimizer.regroup(stage.rate_of)
        self._task.wrap()
        self._current = stage
