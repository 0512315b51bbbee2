"""Stages: which parameters train, and at which learning rate, as a function of the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from clipcluster.train.optimizer import Optimizer, StageRate, full_rate
from clipcluster.train.wrapping import WrappedTask


@dataclass(frozen=True)
class Stage:
    """What trains from step `start` on.

    rate_of: parameter name -> its rate, or None where it is frozen.
    eval_modules: names of the modules in evaluation mode: without dropout, with fixed running statistics.
    """

    start: int = 0
    rate_of: Callable[[str], StageRate | None] = full_rate
    eval_modules: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Counts:
    """How many parameters (numbers, not tensors) train from step `start` on, in all and by part of the model.

    parts: part of the model -> (trainable, all).
    """

    start: int
    trainable: int
    parameters: int
    parts: Mapping[str, tuple[int, int]]

    def __str__(self) -> str:
        partly = [
            f"{name} {train:,} of {all_:,}" for name, (train, all_) in self.parts.items() if train < all_
        ]
        text = (
            f"the stage from step {self.start:,} trains {self.trainable:,} of {self.parameters:,} parameters"
        )
        return f"{text} ({', '.join(partly)})" if partly else text


def counts_of(parameters: Iterable[tuple[str, nn.Parameter]], stage: Stage) -> Counts:
    """The counts of a stage, for parameters by their names in the model."""
    trainable, every = Counter[str](), Counter[str]()
    for name, parameter in parameters:
        part, size = name.partition(".")[0], parameter.numel()
        every[part] += size
        trainable[part] += size if stage.rate_of(name) is not None else 0
    parts = {part: (trainable[part], every[part]) for part in every}
    return Counts(stage.start, trainable.total(), every.total(), parts)


class Stages:
    """The stages of a run. The current one follows from the step alone, after a resume too.

    A frozen parameter has no gradient (None: with zero, weight decay would move it). Parameters that a tower
    itself holds fixed (sinusoidal positions) train in no stage.
    """

    def __init__(
        self, model: nn.Module, task: WrappedTask, optimizer: Optimizer, stages: Sequence[Stage] = (Stage(),)
    ) -> None:
        """Raises ValueError unless the first stage begins at step 0, and each later than the one before."""
        starts = [stage.start for stage in stages]
        if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(f"stages begin at rising steps, the first at 0, not at {starts}")
        self._model, self._task, self._optimizer, self.stages = model, task, optimizer, tuple(stages)
        self._current: Stage | None = None
        self._trainable = [pair for pair in model.named_parameters() if pair[1].requires_grad]

    def enter(self, step: int) -> Counts | None:
        """Enter the stage of `step`; called before a checkpoint of that step is loaded.

        A change of stage wraps the task again, and a rehearsal has to follow. Returns the counts of the new
        stage; None where the stage stays, and in a run of one stage that freezes nothing.
        Raises RuntimeError where other parameters train than the stage says.
        """
        stage = [stage for stage in self.stages if stage.start <= step][-1]
        if stage is self._current:
            return None
        for name, parameter in self._trainable:
            parameter.requires_grad_(stage.rate_of(name) is not None)
            if not parameter.requires_grad:
                parameter.grad = None
        for name, module in self._model.named_modules():
            module.training = name not in stage.eval_modules
        self._optimizer.regroup(stage.rate_of)
        self._task.wrap()
        self._current = stage
        counts = counts_of(self._trainable, stage)
        self._check(counts)
        return counts if len(self.stages) > 1 or counts.trainable < counts.parameters else None

    def _check(self, counts: Counts) -> None:
        """Raises RuntimeError unless autograd and the optimizer have as many parameters as the stage says."""
        seen = sum(parameter.numel() for parameter in self._model.parameters() if parameter.requires_grad)
        if not counts.trainable == seen == self._optimizer.size:
            raise RuntimeError(
                f"the stage from step {counts.start:,} trains {counts.trainable:,} parameters, but {seen:,} "
                f"require a gradient and the optimizer has {self._optimizer.size:,}"
            )
