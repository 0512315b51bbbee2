"""What every run is doing, read from the run folders and from SLURM's queue. Works without SLURM."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from clipcluster.runtime.job_id import local_job_runs
from jobs.endings import history
from jobs.submissions import Intent, job_ids, unanswered
from tools.slurm import QueuedJob, Slurm, SlurmRefused, SlurmUnavailable

ENDED = frozenset({"FINISHED", "STOPPED", "FAILED", "CANCELLED", "TIMEOUT", "LOST", "NEW"})
EXIT_CODES = {"FINISHED": 0, "STOPPED": 85, "CANCELLED": 130}
_TAIL_BYTES = 65536


@dataclass(frozen=True)
class State:
    """What a run is doing: `name` is SUBMITTING, PENDING, RUNNING, COMPLETING, one of ENDED, or UNKNOWN.

    `queued`: SLURM still shows the job, COMPLETING included, or its local process still lives, or one of
    them may still appear (SUBMITTING).
    """

    name: str
    detail: str = ""
    advice: str = ""
    job: str | None = None
    queued: bool = False
    code: int = 0

    @property
    def ended(self) -> bool:
        return self.name in ENDED

    def __str__(self) -> str:
        detail = " ".join(self.detail.split())
        return f"{self.name} ({detail})" if detail else self.name


class Queue:
    """SLURM's queue, asked once, when first needed: runs of this machine need no SLURM."""

    def __init__(self, slurm: Slurm | None = None) -> None:
        self.slurm = slurm or Slurm()

    @cached_property
    def _jobs(self) -> dict[str, QueuedJob] | None:
        try:
            return {job.job_id: job for job in self.slurm.queue(user=getpass.getuser())}
        except (SlurmUnavailable, SlurmRefused):
            return None

    @property
    def silent(self) -> bool:
        """Whether there is no SLURM here, or it gives no answer."""
        return self._jobs is None

    def state(self, job_id: str) -> str | None:
        """PENDING, RUNNING, COMPLETING, …; None for a job that the queue does not show."""
        found = (self._jobs or {}).get(job_id)
        return found.state if found else None

    def reason(self, job_id: str) -> str:
        """Why a job waits, in SLURM's words; empty where it has none."""
        found = (self._jobs or {}).get(job_id)
        return found.reason if found and found.reason != "None" else ""

    def jobs_of(self, run: Run) -> list[str]:
        """The jobs that carry the run's name and, as their comment, its folder."""
        folder = os.path.realpath(run.path)
        return [
            job.job_id
            for job in (self._jobs or {}).values()
            if job.name == run.name and job.comment and os.path.realpath(job.comment) == folder
        ]

    def afterwards(self, job_id: str) -> str | None:
        """How SLURM says that a job ended, as long as it remembers it."""
        try:
            job = None if self.silent else self.slurm.job(job_id)
        except (SlurmUnavailable, SlurmRefused):
            return None
        return job.state if job else None


def state_of(run: Run, queue: Queue) -> State:
    """What the run is doing now."""
    newest = run.newest()
    verdict = history.last_verdict(newest) if newest else None
    live = _live(run, queue)
    if live is not None:
        return _while_queued(run, queue, live, newest, verdict)
    intent = unanswered(run)
    if intent is not None and (submitting := _submitting(queue, intent)):
        return submitting
    if newest is not None and verdict and verdict["event"] in history.FINAL:
        return _final(verdict, newest)
    if newest is not None:
        direct = _without_verdict(newest)
        if direct is not None and verdict is None:
            return direct
    return _gone(run, queue, newest, verdict)


def _live(run: Run, queue: Queue) -> str | None:
    """The run's job that SLURM shows, or the local process that lives; the newest first."""
    for job in reversed(job_ids(run)):
        if local_job_runs(job) if job.startswith("local-") else queue.state(job):
            return job
    intent = unanswered(run)
    if intent is not None and intent.executor == "slurm":
        return next(reversed(queue.jobs_of(run)), None)
    return None


def _submitting(queue: Queue, intent: Intent) -> State | None:
    """The state of a run whose last launch has no answer; None once it is certain that it made no job."""
    if not intent.settled:
        return State("SUBMITTING", f"on {intent.host}; its job is not known yet", queued=True)
    if intent.executor == "slurm" and queue.silent:
        return State("UNKNOWN", "a job of SLURM, which cannot be asked here, may have been submitted")
    return None


def _while_queued(
    run: Run, queue: Queue, job: str, newest: Attempt | None, verdict: Mapping[str, Any] | None
) -> State:
    mine = newest is not None and newest.job == job
    if mine and newest is not None and verdict and verdict["event"] in history.FINAL:
        final = _final(verdict, newest)
        return State(final.name, final.detail, final.advice, job, True, final.code)
    if job in run.cancelled_jobs():
        return State("CANCELLED", "its job is still ending", "", job, True, 130)
    if job.startswith("local-"):
        return State("RUNNING", "", "", job, True)
    state = queue.state(job) or ""
    requeued = bool(mine and verdict and verdict["event"] in ("requeue", "note"))
    if state == "PENDING" or (state == "COMPLETING" and requeued):
        reason = queue.reason(job)
        return State("PENDING", ", ".join(filter(None, ["requeued" if mine else "", reason])), "", job, True)
    if state == "COMPLETING":
        return State("COMPLETING", "", "", job, True)
    return State("RUNNING", "" if mine else "starting", "", job, True)


def _final(verdict: Mapping[str, Any], attempt: Attempt) -> State:
    name = {"finish": "FINISHED", "stop": "STOPPED", "cancel": "CANCELLED"}.get(verdict["event"], "FAILED")
    detail = "" if name == "FINISHED" else verdict.get("reason", "")
    return State(name, detail, verdict.get("advice", ""), attempt.job, False, verdict.get("code", 0))


def _without_verdict(attempt: Attempt) -> State | None:
    """The state of an attempt that nobody judges (torchrun, one process): its outcome is the verdict."""
    outcome = attempt.outcome()
    if outcome is None:
        return None
    if outcome["outcome"] == "finished":
        return State("FINISHED", job=attempt.job)
    if outcome["outcome"] == "failed":
        return State("FAILED", outcome["reason"], outcome["advice"], attempt.job, code=outcome["code"])
    if (attempt.job or "").startswith("local-"):
        return State("STOPPED", outcome["reason"], "", attempt.job, code=outcome["code"])
    return None


def _gone(run: Run, queue: Queue, newest: Attempt | None, verdict: Mapping[str, Any] | None) -> State:
    """The state of a run whose job is in no queue and that no verdict ended."""
    jobs = job_ids(run)
    if not jobs:
        return State("NEW", "nothing was submitted yet")
    job = jobs[-1]
    if job in run.cancelled_jobs():
        return State("CANCELLED", job=job, code=130)
    if newest is not None and _refused(newest):
        return State("STOPPED", "SLURM refused to requeue the job", "Submit the run again.", job, code=85)
    if job.startswith("local-") and local_job_runs(job) is None:
        return State("UNKNOWN", f"job {job} of another machine, which cannot be asked here", job=job)
    if not job.startswith("local-"):
        if queue.silent:
            return State("UNKNOWN", f"job {job} of SLURM, which cannot be asked here", job=job)
        ended = queue.afterwards(job) or ""
        if ended.startswith("CANCELLED"):
            return State("CANCELLED", job=job, code=130)
        if ended == "TIMEOUT":
            return State("TIMEOUT", "the ranks outlived the time limit", _GO_ON, job, code=1)
    where = f"attempt {newest.number}" if newest else "it never claimed the run"
    log = run.submitit / f"{job}_0_log.err"
    detail = f"job {job} ended without recording an outcome: {where}"
    return State("LOST", detail, f"{_GO_ON} Its log: {log}" if log.exists() else _GO_ON, job, code=1)


_GO_ON = "Submit the run again: it resumes from its last checkpoint."


def _refused(attempt: Attempt) -> bool:
    events = history.batch_events(attempt)
    return bool(events) and events[-1].get("event") == "requeue_refused"


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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


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
        lines = _last_lines(attempt.path / "metrics.jsonl")
        if lines:
            return lines[-1]
    return None


def last_event(attempt: Attempt) -> dict[str, Any] | None:
    """The latest event of an attempt, whoever wrote it."""
    ends = (_last_lines(path)[-1:] for path in attempt.path.glob("events-*.jsonl"))
    return max((line for end in ends for line in end), key=lambda line: line.get("time", 0), default=None)


def _last_lines(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            stream.seek(max(0, size - _TAIL_BYTES))
            pieces = stream.read().split(b"\n")
    except OSError:
        return []
    lines = []
    for piece in pieces:
        try:
            line = json.loads(piece)
        except ValueError:
            continue  # empty, torn, or cut at the beginning of what was read
        if isinstance(line, dict):
            lines.append(line)
    return lines


def reports(runs: Iterable[Run], queue: Queue) -> list[Report]:
    """All runs' reports, in order."""
    return [report(run, queue) for run in runs]
