"""When a run is evaluated, and with which weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clipcluster.evals.features import Measured
from clipcluster.evals.suite import Suite
from clipcluster.train.compiling import uncompiled
from clipcluster.train.ema import Ema
from clipcluster.train.precision import Precision
from clipcluster.train.progress import Progress


class Interrupted(Exception):
    """All ranks agreed to stop during an evaluation; it is repeated after the resume."""


@dataclass
class Evaluations:
    """Runs `suite` every `every` steps and at the end of the run; never where the suite is empty.

    model: what is measured, with the averaged weights where there is an `ema`.
    by_job: a separate job measures the step's checkpoint instead.
    """

    suite: Suite
    model: Any
    every: int | None
    total_steps: int
    precision: Precision
    ema: Ema | None
    by_job: bool = False

    def owed(self, progress: Progress) -> bool:
        """Whether this step has to be evaluated and has not been yet."""
        step = progress.step
        if not self.suite or step in (0, progress.evaluated_step):
            return False
        return step == self.total_steps or (self.every is not None and step % self.every == 0)

    def measure(self, progress: Progress, tick: Callable[[], None]) -> Measured:
        """Evaluate; every rank calls it. `tick` runs between batches and may raise Interrupted."""
        averaged = self.ema.applied if self.ema else None
        with uncompiled(), self.precision.autocast():
            return self.suite.run(self.model, progress, tick=tick, averaged=averaged)
