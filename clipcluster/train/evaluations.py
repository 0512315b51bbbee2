"""When a run is evaluated, with which weights, and where the results go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from clipcluster.runs.attempts import Attempt
from clipcluster.runs.checkpoints import name_of
from clipcluster.runs.files import write_json
from clipcluster.runs.folder import Run
from clipcluster.runtime.world import World
from clipcluster.train.ema import Ema
from clipcluster.train.precision import Precision
from clipcluster.train.progress import Progress


class Interrupted(Exception):
    """All ranks agreed to stop during an evaluation; it is repeated after the resume."""


class Suite(Protocol):
    """What measures a model; the trainer knows none of the metrics' names."""

    def run(self, model: Any, progress: Progress, *, wishes: Callable[[], None]) -> dict[str, float]: ...


class Evaluations:
    """Owed at every `every` steps and at the end; None for `suite` means never.

    `model` is measured, with the averaged weights where there is an `ema`.
    """

    def __init__(
        self,
        suite: Suite | None,
        model: nn.Module,
        *,
        every: int | None,
        total_steps: int,
        run: Run,
        attempt: Attempt,
        world: World,
        precision: Precision,
        ema: Ema | None,
    ) -> None:
        self._suite, self._model, self._every, self._total = suite, model, every, total_steps
        self._run, self._attempt, self._world = run, attempt, world
        self._precision, self._ema = precision, ema

    def owed(self, progress: Progress) -> bool:
        """Whether this step is to be evaluated and was not yet."""
        if self._suite is None or progress.step == 0 or progress.evaluated_step == progress.step:
            return False
        return progress.step == self._total or (self._every is not None and progress.step % self._every == 0)

    def measure(self, progress: Progress, wishes: Callable[[], None]) -> dict[str, float]:
        """Evaluate; every rank calls it. `wishes` runs between batches and may raise Interrupted."""
        assert self._suite is not None
        averaged = self._ema.applied() if self._ema else nullcontext()
        with averaged, torch.no_grad(), self._precision.autocast():
            return self._suite.run(self._model, progress, wishes=wishes)

    def write(self, progress: Progress, results: Mapping[str, float]) -> None:
        """Write `evals/step-….json` (rank 0). Raises StaleAttempt."""
        if not self._world.is_main:
            return
        self._attempt.check()
        self._run.evals.mkdir(exist_ok=True)
        document = {
            "step": progress.step,
            "samples": progress.samples,
            "epoch": round(progress.epoch, 6),
            "attempt": self._attempt.number,
            "ema": self._ema is not None,
            "metrics": dict(results),
        }
        write_json(self._run.evals / f"{name_of(progress.step)}.json", document)
