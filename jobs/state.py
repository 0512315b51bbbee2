"""The state of a run, read from its folder and from SLURM's queue. Works without SLURM."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from clipcluster.runtime.job_id import local_job_runs
from clipcluster.runtime.outcome import Outcome
from jobs.endings import history
from jobs.submissions import Intent, job_ids, unanswered
from tools.slurm import QueuedJob, Slurm, SlurmRefused, SlurmUnavailable

ENDED = frozenset({"FINISHED", "STOPPED", "FAILED", "CANCELLED", "TIMEOUT", "LOST", "NEW"})
ASK_SECONDS = 10.0  # between two questions to SLURM about a run that is watched
_RESUBMIT = "Submit the run again: it resumes from its last checkpoint."


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
            # By number: the variables that name a user may name another one, whose queue is no error.
            return {job.job_id: job for job in self.slurm.queue(user=str(os.getuid()))}
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


class Watched:
    """A run whose state is asked for again and again; SLURM is asked every ASK_SECONDS."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._queue, self._asked = Queue(), time.monotonic()

    def state(self) -> State:
        """What the run is doing now."""
        if time.monotonic() - self._asked > ASK_SECONDS:
            self._queue, self._asked = Queue(), time.monotonic()
        return state_of(self._run, self._queue)


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
    if newest is not None and job_ids(run)[-1:] != [newest.job] and not run.finished():
        newest = verdict = None  # a later job came to its end without a claim
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
        return State("CANCELLED", "its job is still ending", "", job, True, Outcome.CANCELLED)
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
        return State("CANCELLED", job=job, code=Outcome.CANCELLED)
    if newest is not None and _refused(newest):
        return State(
            "STOPPED", "SLURM refused to requeue the job", "Submit the run again.", job, code=Outcome.STOPPED
        )
    if job.startswith("local-") and local_job_runs(job) is None:
        return State("UNKNOWN", f"job {job} of another machine, which cannot be asked here", job=job)
    if not job.startswith("local-"):
        if queue.silent:
            return State("UNKNOWN", f"job {job} of SLURM, which cannot be asked here", job=job)
        ended = queue.afterwards(job) or ""
        if ended.startswith("CANCELLED"):
            return State("CANCELLED", job=job, code=Outcome.CANCELLED)
        if ended == "TIMEOUT":
            return State("TIMEOUT", "the ranks outlived the time limit", _RESUBMIT, job, code=1)
    where = f"attempt {newest.number}" if newest else "it never claimed the run"
    log = run.submitit / f"{job}_0_log.err"
    detail = f"job {job} ended without recording an outcome: {where}"
    return State("LOST", detail, f"{_RESUBMIT} Its log: {log}" if log.exists() else _RESUBMIT, job, code=1)


def _refused(attempt: Attempt) -> bool:
    events = history.batch_events(attempt)
    return bool(events) and events[-1].get("event") == "requeue_refused"
