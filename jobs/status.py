"""What `clipcluster status` reports of runs: state and progress, from the ends of their files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clipcluster.runs import files
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from jobs.endings import history
from jobs.state import Queue, state_of

_TAIL_BYTES = 65536


@dataclass(frozen=True)
class Report:
    """One run in `clipcluster status`; `time`s in seconds since 1970."""

    name: str
    path: str
    state: str
    detail: str
    advice: str
    job: str | None
    attempt: int | None
    step: int | None
    total_steps: int | None
    epoch: float | None
    loss: float | None
    samples_per_second: float | None
    checkpoint: int | None
    last_event: str | None
    last_event_time: float | None


def report(run: Run, queue: Queue) -> Report:
    """State and progress of one run, reading the ends of its files only."""
    state = state_of(run, queue)
    newest = run.newest()
    line = last_metrics(run) or {}
    event = last_event(newest) if newest else None
    checkpoint = history.newest_checkpoint(run)
    return Report(
        name=run.name,
        path=str(run.path),
        state=state.name,
        detail=state.detail,
        advice=state.advice,
        job=state.job,
        attempt=newest.number if newest else None,
        step=max((step for step in (line.get("step"), checkpoint) if step is not None), default=None),
        total_steps=total_steps(run),
        epoch=line.get("epoch"),
        loss=line.get("loss"),
        samples_per_second=line.get("samples_per_second"),
        checkpoint=checkpoint,
        last_event=event.get("event") if event else None,
        last_event_time=event.get("time") if event else None,
    )


def total_steps(run: Run) -> int | None:
    """Steps of the whole run, as planned at its last submission."""
    try:
        plan = run.settings().get("plan") or {}
    except OSError:
        return None
    total = plan.get("total_steps")
    return total if isinstance(total, int) else None


def last_metrics(run: Run) -> dict[str, Any] | None:
    """The last line of metrics of the newest attempt that wrote one."""
    for attempt in reversed(run.attempts()):
        lines = files.read_lines(attempt.path / "metrics.jsonl", last_bytes=_TAIL_BYTES)
        if lines:
            return lines[-1]
    return None


def last_event(attempt: Attempt) -> dict[str, Any] | None:
    """The latest event of an attempt, whoever wrote it."""
    written = attempt.path.glob("events-*.jsonl")
    ends = (files.read_lines(path, last_bytes=_TAIL_BYTES)[-1:] for path in written)
    return max((line for end in ends for line in end), key=lambda line: line.get("time", 0), default=None)
