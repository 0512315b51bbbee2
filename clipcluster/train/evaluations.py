"""When a run is evaluated, with which weights, and where the results go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from clipcluster.evals.suite import Suite
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.checkpoints import name_of
from clipcluster.runs.files import write_json
from clipcluster.runs.folder import Run
from clipcluster.train.ema import Ema
from clipcluster.train.precision import Precision
from clipcluster.train.progress import Progress


class Interrupted(Exception):
    """All ranks agreed to stop during an evaluation; it is repeated after the resume."""


@dataclass
class Evaluations:
    """Owed at every `every` steps and at the end; never where `suite` is empty.

    `model` is measured, with the averaged weights where there is an `ema`.
    """

    suite: Suite
    model: Any
    every: int | None
    total_steps: int
    precision: Precision
    ema: Ema | None

    def owed(self, progress: Progress) -> bool:
        """Whether this step is to be evaluated and was not yet."""
        step = progress.step
        if not self.suite or step in (0, progress.evaluated_step):
            return False
        return step == self.total_steps or (self.every is not None and step % self.every == 0)

    def measure(self, progress: Progress, wishes: Callable[[], None]) -> dict[str, float]:
        """Evaluate; every rank calls it. `wishes` runs between batches and may raise Interrupted."""
        averaged = self.ema.applied() if self.ema else nullcontext()
        with averaged, self.precision.autocast():
            return self.suite.run(self.model, progress, wishes=wishes)

    def write(self, attempt: Attempt, progress: Progress, results: Mapping[str, float]) -> None:
        """Write `evals/step-….json`; rank 0 alone. Raises StaleAttempt."""
        attempt.check()
        folder = Run(attempt.run).evals
        folder.mkdir(exist_ok=True)
        document = {
            **progress.counts(),
            "attempt": attempt.number,
            "ema": self.ema is not None,
            "metrics": dict(results),
        }
        write_json(folder / f"{name_of(progress.step)}.json", document)
