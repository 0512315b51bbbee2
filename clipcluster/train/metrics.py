"""Metrics of a run: one line of JSON a log step first, TensorBoard and the rank's log after it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from clipcluster.evals.headline import headline_text
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics
from clipcluster.runtime.world import World
from clipcluster.train.board import Board
from clipcluster.train.progress import Progress

if TYPE_CHECKING:
    from clipcluster.model.task import Report

logger = logging.getLogger("clipcluster")


class Metrics:
    """Averages what the ranks report at log steps and writes it, on rank 0, into `metrics.jsonl`.

    The loss is that of the step itself, not a mean since the last line: a resumed run logs the same numbers.
    Rates are measured since the last line.

    Args:
        every: steps between two lines; the first and the last step have one too.
    """

    def __init__(self, run: Run, attempt: Attempt, world: World, *, every: int, total_steps: int) -> None:
        self._run, self._attempt, self._world = run, attempt, world
        self._every, self._total = every, total_steps
        self._last_line: dict[str, Any] = {}
        self._board: Board | None = None
        self.restart_clock(0)

    def open(self, progress: Progress) -> None:
        """Begin at the step that the run has reached."""
        self.restart_clock(progress.samples)
        if self._world.is_main:
            self._board = Board(self._run.tensorboard, attempt=self._attempt.number, step=progress.step)

    def restart_clock(self, samples: int) -> None:
        """Measure rates from here on: what happened between (an evaluation, a roll-back) is not training."""
        self._since, self._samples_before, self._waited = time.monotonic(), samples, 0.0

    def waited(self, seconds: float) -> None:
        """Count time that this rank spent waiting for a batch."""
        self._waited += seconds

    def due(self, progress: Progress) -> bool:
        """Whether this step has a line."""
        return progress.step % self._every == 0 or progress.step in (1, self._total)

    def write(self, progress: Progress, report: Report, *, lr: float, bad: int, **extra: float) -> int:
        """Reduce over the ranks and write a line. Every rank calls it at the same step.

        `bad`: samples this rank found bad since the last line; returns the sum over the ranks.
        Raises StaleAttempt.
        """
        names = sorted(report.metrics)
        values = torch.stack([report.metrics[name].detach().reshape(()).double() for name in names])
        own = torch.tensor([self._waited, float(bad)], dtype=torch.float64, device=values.device)
        summed = self._world.all_reduce_sum(torch.cat((values, own)))
        *means, waited, all_bad = (summed / self._world.size).tolist()
        if self._world.is_main:
            rates = self._rates(progress)
            line = {"step": progress.step, "samples": progress.samples, "epoch": round(progress.epoch, 6)}
            line |= dict(zip(names, means, strict=True)) | {"lr": lr, **rates, **extra}
            line["data_wait_seconds"] = round(waited, 4)
            self._put(line)
        self.restart_clock(progress.samples)
        return round(all_bad * self._world.size)

    def _rates(self, progress: Progress) -> dict[str, float]:
        seconds = max(1e-9, time.monotonic() - self._since)
        return {"samples_per_second": round((progress.samples - self._samples_before) / seconds, 2)}

    def _put(self, line: dict[str, Any]) -> None:
        self._attempt.metrics(line)
        self._last_line = line
        self._scalars(line, "train", line["step"])
        logger.info("step %s/%s  %s", f"{line['step']:,}", f"{self._total:,}", summary(line))

    def write_results(self, progress: Progress, results: dict[str, float]) -> None:
        """Add an evaluation's results to the line of its step (rank 0). Raises StaleAttempt.

        The later line of a step wins, so it repeats what training wrote there, perhaps in an earlier attempt.
        """
        if not self._world.is_main:
            return
        line = self._last_line
        if line.get("step") != progress.step:
            before = (known for known in merged_metrics(self._run) if known["step"] == progress.step)
            known = next(before, {"samples": progress.samples, "epoch": round(progress.epoch, 6)})
            line = {key: value for key, value in known.items() if key not in ("attempt", "time")}
        self._last_line = {"step": progress.step, **line, **results}
        self._attempt.metrics(self._last_line)
        self._scalars(results, "evaluation", progress.step)
        self.say(f"evaluation at step {progress.step:,}: {headline_text(results)}")

    def say(self, text: str) -> None:
        """A message beside the metrics, from rank 0."""
        if self._world.is_main:
            logger.info("%s", text)

    def _scalars(self, line: dict[str, Any], group: str, step: int) -> None:
        if self._board:
            counts = ("step", "samples", "epoch")
            self._board.add(group, {name: value for name, value in line.items() if name not in counts}, step)

    def close(self) -> None:
        """Flush TensorBoard's file."""
        if self._board:
            self._board.close()


def summary(line: Mapping[str, Any]) -> str:
    """The few numbers of a line of metrics that a person follows."""
    parts = [f"epoch {line['epoch']:.2f}", f"loss {line['loss']:.4f}", f"lr {line['lr']:.2e}"]
    parts.append(f"{line['samples_per_second']:,.0f} samples/s")
    parts.append(f"waited {line['data_wait_seconds']:.2f} s for data")
    if line.get("skipped_steps"):
        parts.append(f"{line['skipped_steps']} steps skipped")
    return "  ".join(parts)
