"""When a run is evaluated, with which weights, and where the results go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from clipcluster.runs.attempts import Attempt
from clipcluster.runs.files import write_json
from clipcluster.runs.folder import Run
from clipcluster.runtime.world import World
from clipcluster.train.precision import Precision
from clipcluster.train.progress import Progress


class Interrupted(Exception):
    """All ranks agreed to stop in the middle of an evaluation, which stays owed."""


class Suite(Protocol):
    """What measures a model; the trainer knows none of the metrics' names."""

    def run(self, model: Any, progress: Progress, *, wishes: Callable[[], None]) -> dict[str, float]: ...


class Evaluations:
    """Owed at every `every` steps and at the end; None for `suite` means never.

    `model` is what is measured: the averaged weights where there are any, else the trained ones.
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
        averaged: bool,
    ) -> None:
        self._suite, self._model, self._every, self._total = suite, model, every, total_steps
        self._run, self._attempt, self._world = run, attempt, world
        self._precision, self._averaged = precision, averaged

    def owed(self, progress: Progress) -> bool:
        """Whether this step is to be evaluated and was not yet."""
        if self._suite is None or progress.step == 0 or progress.evaluated_step == progress.step:
            return False
        return progress.step == self._total or (self._every is not None and progress.step % self._every == 0)

    def measure(self, progress: Progress, wishes: Callable[[], None]) -> dict[str, float]:
        """Evaluate; every rank calls it. `wishes` runs between batches and may raise Interrupted."""
        assert self._suite is not None
        training = self._model.training
        self._share_buffers()
        self._model.eval()
        try:
            with torch.no_grad(), self._precision.autocast():
                return self._suite.run(self._model, progress, wishes=wishes)
        finally:
            self._model.train(training)

    def _share_buffers(self) -> None:
        """Give all ranks rank 0's running statistics: each rank counted its own batches."""
        for _, buffer in self._model.named_buffers():
            self._world.broadcast_tensor(buffer)

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
            "ema": self._averaged,
            "metrics": dict(results),
        }
        write_json(self._run.evals / f"step-{progress.step:08d}.json", document)
