"""Metrics of a run: a line of `metrics.jsonl` per log step, then TensorBoard and the rank's log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

import torch

from clipcluster.evals.headline import headline_text
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.checkpoints import name_of
from clipcluster.runs.files import write_json
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics
from clipcluster.runtime.world import World
from clipcluster.train.progress import Progress
from clipcluster.train.sinks import CLOSE_SECONDS, HURRY_SECONDS, Sink, close_sinks, open_sinks
from clipcluster.train.watchdog import named
from clipcluster.train.work import Slowness, Work, slow_ranks

if TYPE_CHECKING:
    from clipcluster.evals.features import Measured
    from clipcluster.model.task import Report

logger = logging.getLogger("clipcluster")


class Metrics:
    """Averages what the ranks report at log steps and writes it, on rank 0, into `metrics.jsonl`.

    The loss is that of the step, not a mean since the last line, so that a resumed run logs the same numbers.
    `samples_per_second` and `data_wait_seconds` are measured since the last line; `waited_for_others` are the
    seconds that this rank, with its own batches there, stood still for another that waited longer.

    Args:
        every: steps between two lines; the first and the last step of the run have one too.
        log_to: what else gets the curves (`clipcluster.train.sinks`).
    """

    def __init__(
        self, attempt: Attempt, world: World, *, every: int, total_steps: int, log_to: Sequence[str] = ()
    ) -> None:
        self._run, self._attempt, self._world = Run(attempt.run), attempt, world
        self._every, self._total = every, total_steps
        self.work = Work(world.device, world.pulse)
        self._slowness = Slowness()
        self._last_line: dict[str, Any] = {}
        self._board: Board | None = None
        self._unwritten: list[tuple[dict[str, Any], Measured]] = []
        self._log_to, self._sinks = log_to, list[Sink]()
        self.waited_for_others = 0.0
        self.restart_clock(0)

    def open(self, progress: Progress) -> None:
        """Begin at the step that the run has reached."""
        self.restart_clock(progress.samples)
        if self._world.is_main:
            number = self._attempt.number
            purge = progress.step + 1 if number > 1 else None
            self._board = Board(self._run.tensorboard, f".attempt-{number}", purge)
            self._sinks = open_sinks(self._log_to, self._run)

    def restart_clock(self, samples: int) -> None:
        """Measure rates from here on: the time of an evaluation or a roll-back is not training."""
        self._since, self._samples_before = time.monotonic(), samples
        self.work.restart()

    def due(self, progress: Progress) -> bool:
        """Whether this step has a line of metrics."""
        return progress.step % self._every == 0 or progress.step in (1, self._total)

    def write(self, progress: Progress, report: Report, *, lr: float, bad: int, **extra: float) -> int:
        """Reduce over the ranks and write a line. Every rank calls it at the same step.

        lr: the schedule's learning rate at the step. bad: samples that this rank found bad since the last
        line. Returns their sum over the ranks. Raises StaleAttempt.
        """
        names = sorted(report.metrics)
        values = torch.stack([report.metrics[name].detach().reshape(()).double() for name in names])
        size = self._world.size
        own = torch.zeros(2 * size + 1, dtype=torch.float64)  # of each rank its own, zero of the others
        own[self._world.rank], own[size + self._world.rank] = self.work.take()
        own[-1] = bad
        summed = self._world.all_reduce_sum(torch.cat((values, own.to(values.device)))).tolist()
        seconds = max(1e-9, time.monotonic() - self._since)
        means = [value / size for value in summed[: len(names)]]
        waits, computes = summed[len(names) : -1][:size], summed[len(names) : -1][size:]
        self.waited_for_others = max(waits) - waits[self._world.rank]
        if self._world.is_main:
            rate, waited = (progress.samples - self._samples_before) / seconds, sum(waits) / size
            line = {**progress.counts(), **dict(zip(names, means, strict=True)), "lr": lr}
            line |= {"samples_per_second": round(rate, 2), **extra, "data_wait_seconds": round(waited, 4)}
            self._put("train", line, line)
            self._judge(waits, computes, seconds)
            logger.info("step %s/%s  %s", f"{progress.step:,}", f"{self._total:,}", _summary(line))
        self.restart_clock(progress.samples)
        return round(summed[-1])

    def _judge(self, waits: list[float], computes: list[float], seconds: float) -> None:
        """Record which ranks hold up the others, where that changed; `seconds` since the last line."""
        own = [wait + compute for wait, compute in zip(waits, computes, strict=True)]
        found = slow_ranks(own, seconds) if self.work.compares else []
        if not self._slowness.changed(found, seconds):
            return
        ranks = self._slowness.ranks
        nodes = self._attempt.nodes(ranks)
        shares = {
            "share": [round(own[rank] / seconds, 3) for rank in ranks],
            "data_share": [round(waits[rank] / seconds, 3) for rank in ranks],
            "median_share": round(median_low(own) / seconds, 3),
        }
        reason = f"{named(ranks, nodes)}: the others wait" if ranks else "no rank any more"
        self._attempt.event("slow", writer="rank-0", ranks=ranks, nodes=nodes, **shares, reason=reason)
        logger.warning("slow: %s", reason)

    def write_results(self, progress: Progress, measured: Measured, *, averaged: bool) -> None:
        """Write `evals/step-….json`, and the results into the line of their step.

        `evals/details-….json` has what stands behind the results (`clipcluster.evals.features.Measured`).
        What cannot be written is kept for `write_unwritten`. Raises StaleAttempt, OSError.
        """
        if self._world.is_main:
            self.say(f"evaluation at step {progress.step:,}: {headline_text(measured.metrics)}")
            self._unwritten.append(({**progress.counts(), "ema": averaged}, measured))
            self.write_unwritten()

    def write_unwritten(self) -> None:
        """Write the results that were not written when they were found. Raises StaleAttempt, OSError."""
        while self._unwritten:
            self._write_results(*self._unwritten[0])
            del self._unwritten[0]

    def forget_unwritten(self) -> None:
        """Results of steps that a roll-back undid are not written any more."""
        self._unwritten.clear()

    def _write_results(self, about: Mapping[str, Any], measured: Measured) -> None:
        # The later line of a step wins, so it repeats what training wrote there, perhaps in another attempt.
        self._attempt.check()
        self._run.evals.mkdir(exist_ok=True)
        step, attempt = about["step"], self._attempt.number
        details = {"step": step, "attempt": attempt, "sets": measured.details}
        write_json(self._run.evals / f"details-{step:08d}.json", details)
        results = measured.metrics
        document = {**about, "attempt": attempt, "metrics": results}
        write_json(self._run.evals / f"{name_of(step)}.json", document)
        line = self._last_line
        if line.get("step") != step:
            counts = {name: about[name] for name in ("step", "samples", "epoch")}
            known = next((known for known in merged_metrics(self._run) if known["step"] == step), counts)
            line = {key: value for key, value in known.items() if key not in ("attempt", "time")}
        self._put("evaluation", {**line, **results}, {"step": step, **results})

    def _put(self, group: str, line: dict[str, Any], curves: Mapping[str, Any]) -> None:
        self._attempt.metrics(line)
        self._last_line = line
        if self._board:
            self._board.add(group, curves)
        for sink in self._sinks:
            sink.add(group, curves)

    def say(self, text: str) -> None:
        """Log a message on rank 0."""
        if self._world.is_main:
            logger.info("%s", text)

    def close(self, *, patient: bool = True) -> None:
        """Flush TensorBoard's file, and end what else has the curves; patient: nobody waits for the node."""
        if self._board:
            self._board.close()
        close_sinks(self._sinks, CLOSE_SECONDS if patient else HURRY_SECONDS)
        self._sinks = []


class Board:
    """TensorBoard's curves: a file in `folder`. TensorBoard follows the newest file of a folder only.

    Where they cannot be written (a full disk), one warning says so and the rest of the attempt has none.
    """

    def __init__(self, folder: Path, suffix: str, purge: int | None = None) -> None:
        """`purge`: points of earlier files from this step on are hidden."""
        self._writer: Any = None
        with self._giving_up():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), filename_suffix=suffix, purge_step=purge)

    def add(self, group: str, line: Mapping[str, Any]) -> None:
        """Add points GROUP/NAME at the line's step; the caller has checked that the attempt is not stale."""
        with self._giving_up():
            for name, value in line.items():
                counted = name in ("step", "samples", "epoch")
                if self._writer and not counted and isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{group}/{name}", value, line["step"])

    def close(self) -> None:
        """Write what is buffered, and close the file."""
        with self._giving_up():
            if self._writer:
                self._writer.close()
        self._writer = None

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # errors of TensorBoard's thread are raised here
            self._writer = None
            logger.warning("TensorBoard curves stop for the rest of this attempt: %s", error)


def _summary(line: Mapping[str, Any]) -> str:
    """A line of metrics as the log has it: epoch, loss, learning rate and speed."""
    parts = [f"epoch {line['epoch']:.2f}", f"loss {line['loss']:.4f}", f"lr {line['lr']:.2e}"]
    parts.append(f"{line['samples_per_second']:,.0f} samples/s")
    parts.append(f"waited {line['data_wait_seconds']:.2f} s for data")
    if line.get("skipped_steps"):
        parts.append(f"{line['skipped_steps']} steps skipped")
    return "  ".join(parts)
