"""The state and progress of a run, read from its folder and from SLURM's queue. Works without SLURM."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from clipcluster.runs import files
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.chains import runs_before
from clipcluster.runs.evaluations import Owed, failed_of, owed_by
from clipcluster.runs.folder import LISTED_SECONDS, Run
from clipcluster.runs.mounts import shows_late
from clipcluster.runtime.job_id import local_job_runs
from clipcluster.runtime.outcome import Outcome
from jobs.endings import history
from jobs.submissions import Intent, job_ids, last_wait, log_folder, unanswered
from tools.slurm import WAITING, JobState, QueuedJob, Slurm, SlurmRefused, SlurmUnavailable

ENDED = frozenset({"FINISHED", "STOPPED", "FAILED", "CANCELLED", "TIMEOUT", "LOST", "NEW"})
NOT_SHOWN_YET = "its last records do not show here yet"
ASK_SECONDS = 10.0  # between two questions to SLURM about a run that is watched
_TAIL_BYTES = 65536
_ENDS = {"finish": "FINISHED", "stop": "STOPPED", "cancel": "CANCELLED", "fail": "FAILED"}
_RESUBMIT = "Submit the run again: it resumes from its last checkpoint."


@dataclass(frozen=True)
class State:
    """What a run is doing: `name` is SUBMITTING, PENDING, RUNNING, COMPLETING, one of ENDED, or UNKNOWN.

    `queued`: SLURM still shows the job, COMPLETING included, or its local process still lives, or one of
    them may still appear (SUBMITTING), or what the job wrote last may (COMPLETING, NOT_SHOWN_YET).
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
    """SLURM's queue, asked once, when first needed: runs of this machine need no SLURM.

    asked: when, in seconds since 1970. lost_touch: whether a question about an ended job had no answer.
    """

    asked = math.inf
    lost_touch = False

    def __init__(self, slurm: Slurm | None = None) -> None:
        self.slurm = slurm or Slurm()
        self._remembered = dict[str, JobState | None]()

    @cached_property
    def _jobs(self) -> dict[str, QueuedJob] | None:
        self.asked = time.time()
        try:
            # By number: the variables that name a user may name another one, whose queue is no error.
            return {job.job_id: job for job in self.slurm.queue(user=str(os.getuid()))}
        except (SlurmUnavailable, SlurmRefused):
            return None

    def ask(self) -> None:
        """Ask SLURM now, unless it was asked before."""
        _ = self._jobs

    @property
    def silent(self) -> bool:
        """Whether there is no SLURM here, or it gives no answer."""
        return self._jobs is None

    def job(self, job_id: str) -> QueuedJob | None:
        """A job that waits, runs or is completing."""
        return (self._jobs or {}).get(job_id)

    def jobs_of(self, run: Run, intent: Intent) -> list[str]:
        """The jobs of a launch: the member of its array, else those with the run's name and folder."""
        if intent.task is not None:
            ids = (job.job_id for job in (self._jobs or {}).values() if job.comment == intent.comment)
            return [job_id for job_id in ids if job_id.endswith(f"_{intent.task}")]
        folder = os.path.realpath(run.path)
        return [
            job.job_id
            for job in (self._jobs or {}).values()
            if job.name == run.name and job.comment and os.path.realpath(job.comment) == folder
        ]

    def afterwards(self, job_id: str) -> JobState | None:
        """What SLURM says of a job that ended, as long as it remembers it."""
        if self.silent or self.lost_touch:
            return None
        if job_id not in self._remembered:
            try:
                self._remembered[job_id] = self.slurm.job(job_id)
            except SlurmUnavailable:  # not asked again for every other run
                self.lost_touch = True
                return None
            except SlurmRefused:
                self._remembered[job_id] = None
        return self._remembered[job_id]


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
    newest, intent, jobs = run.newest(), unanswered(run), job_ids(run)
    job = _live(run, queue, jobs, intent)
    if job is not None:
        return _while_queued(run, queue, job, newest if newest and newest.job == job else None)
    if intent is not None and intent.waits:
        return State("PENDING", "waits for its turn on this machine", queued=True)
    if intent is not None and intent.waits_elsewhere:
        return State("UNKNOWN", f"waits for its turn on {intent.host}, which cannot be asked here")
    if intent is not None and not intent.settled:
        return State("SUBMITTING", f"on {intent.host}; its job is not known yet", queued=True)
    if intent is not None and intent.executor == "slurm" and queue.silent:
        return State("UNKNOWN", "a job of SLURM, which cannot be asked here, may have been submitted")
    if newest is not None and jobs[-1:] != [newest.job] and not run.finished():
        newest = None  # a later job came to its end without a claim
    ended = _of_ended(newest) if newest else None
    return ended or _gone(run, queue, jobs, newest)


def _live(run: Run, queue: Queue, jobs: Sequence[str], intent: Intent | None) -> str | None:
    """The run's job that SLURM shows, or the local process that lives; the newest first."""
    for job in reversed(jobs):
        if local_job_runs(job) if job.startswith("local-") else queue.job(job):
            return job
    if intent is not None and intent.executor == "slurm":
        return next(reversed(queue.jobs_of(run, intent)), None)
    return None


def _while_queued(run: Run, queue: Queue, job: str, attempt: Attempt | None) -> State:
    """The state of a run with a job; `attempt`: the newest one, where it is this job's."""
    shown = None if job.startswith("local-") else queue.job(job)
    late = _finished(attempt) if attempt and shown and shown.state in WAITING else None
    if late is not None:
        return late  # SLURM requeued the job; it will find nothing to do
    ended = _by_verdict(attempt) if attempt else None
    if ended is not None:
        return replace(ended, queued=True)
    if job in run.cancelled_jobs():
        return State("CANCELLED", "its job is still ending", job=job, queued=True, code=Outcome.CANCELLED)
    if shown is None:
        return State("RUNNING", job=job, queued=True)
    verdict = history.last_verdict(attempt) if attempt else None
    if shown.reason == "DependencyNeverSatisfied":
        return State("COMPLETING", "SLURM is about to cancel it", job=job, queued=True)
    if attempt and not verdict and attempt.claim().get("time", 0.0) > queue.asked:
        return State("RUNNING", job=job, queued=True)  # SLURM's answer is older than this claim
    if shown.state in WAITING or (shown.state == "COMPLETING" and verdict):
        why = ["requeued" if attempt else "", shown.reason if shown.reason != "None" else ""]
        return State("PENDING", ", ".join(filter(None, why)), job=job, queued=True)
    if shown.state == "COMPLETING":
        return State("COMPLETING", job=job, queued=True)
    return State("RUNNING", "" if attempt else "starting", job=job, queued=True)


def _of_ended(attempt: Attempt) -> State | None:
    """The state of a run by its newest attempt, whose job is gone; None where that tells nothing.

    Ranks on a node that SLURM had lost may have finished the run after the verdict.
    """
    verdict = _by_verdict(attempt)
    try:
        late = _finished(attempt)
    except files.BrokenFile:
        if verdict is None:
            raise
        late = None
    return late or verdict or _by_outcome(attempt)


def _finished(attempt: Attempt) -> State | None:
    """The state of an attempt whose outcome is that the run is finished; else None."""
    outcome = attempt.outcome()
    if outcome is None or outcome["outcome"] != "finished":
        return None
    return State("FINISHED", "", outcome["advice"], attempt.job, code=outcome["code"])


def _by_verdict(attempt: Attempt) -> State | None:
    """The state of a run that the verdict on its newest attempt ended."""
    verdict = history.last_verdict(attempt)
    name = _ENDS.get(verdict["event"]) if verdict else None
    if verdict is None or name is None:
        return None
    detail = "" if name == "FINISHED" else verdict.get("reason", "")
    return State(name, detail, verdict.get("advice", ""), attempt.job, code=verdict.get("code", 0))


def _by_outcome(attempt: Attempt) -> State | None:
    """The state of an attempt that nobody judges (torchrun, one process): its outcome is the verdict."""
    outcome = attempt.outcome()
    if outcome is None or history.last_verdict(attempt) is not None:
        return None
    name = outcome["outcome"].upper()
    if name == "STOPPED" and not (attempt.job or "").startswith("local-"):
        return None
    return State(name, outcome["reason"], outcome["advice"], attempt.job, code=outcome["code"])


def _gone(run: Run, queue: Queue, jobs: Sequence[str], newest: Attempt | None) -> State:
    """The state of a run whose job is in no queue and that no verdict ended."""
    if not jobs:
        return _never_submitted(run)
    job = jobs[-1]
    if job in run.cancelled_jobs():
        return State("CANCELLED", job=job, code=Outcome.CANCELLED)
    events = history.batch_events(newest) if newest else []
    if events and events[-1].get("event") == "requeue_refused":
        detail = "SLURM refused to requeue the job"
        return State("STOPPED", detail, "Submit the run again.", job, code=Outcome.STOPPED)
    if job.startswith("local-") and local_job_runs(job) is None:
        return State("UNKNOWN", f"job {job} of another machine, which cannot be asked here", job=job)
    if not job.startswith("local-"):
        if queue.silent:
            return State("UNKNOWN", f"job {job} of SLURM, which cannot be asked here", job=job)
        unfinished = "" if newest else unfinished_before(run, queue)
        if unfinished:
            detail = f"what comes first did not finish: {unfinished}"
            return State("CANCELLED", detail, job=job, code=Outcome.CANCELLED)
        known = queue.afterwards(job)
        ended = known.state if known else ""
        if ended.startswith("CANCELLED"):
            return State("CANCELLED", "" if newest else "before it started", job=job, code=Outcome.CANCELLED)
        if ended == "TIMEOUT":
            return State("TIMEOUT", "the ranks outlived the time limit", _RESUBMIT, job, code=1)
        if queue.lost_touch:
            return State("UNKNOWN", f"job {job} of SLURM, which gives no answer about it", job=job)
        if known and _shows_late(run, known):
            return State("COMPLETING", NOT_SHOWN_YET, job=job, queued=True)
    where = f"attempt {newest.number}" if newest else "it never claimed the run"
    log = log_folder(run, job) / f"{job}_0_log.err"
    detail = f"job {job} ended without recording an outcome: {where}"
    return State("LOST", detail, f"{_RESUBMIT} Its log: {log}" if log.exists() else _RESUBMIT, job, code=1)


def _shows_late(run: Run, job: JobState) -> bool:
    """Whether a job that has just ended by itself may have left records that do not show here yet."""
    if job.state not in ("COMPLETED", "FAILED", "OUT_OF_MEMORY") or job.end_time is None:
        return False
    return time.time() - job.end_time.timestamp() < LISTED_SECONDS and shows_late(run.path)


def _never_submitted(run: Run) -> State:
    """The state of a run without any job: new, or it waited for its turn on this machine, in vain."""
    waited = last_wait(run)
    if waited is None:
        return State("NEW", "nothing was submitted yet")
    refused = waited.get("refused")
    if refused is None:
        return State("LOST", "the process that was to start it has ended", _RESUBMIT, code=1)
    detail = "before its turn came" if refused == "cancelled" else refused
    return State("CANCELLED", detail, code=Outcome.CANCELLED)


def unfinished_before(run: Run, queue: Queue) -> str:
    """The runs that it waited for and that ended unfinished, and how; empty where there are none."""
    states = {first.name: state_of(first, queue) for first in runs_before(run)}
    ended = {name: state.name for name, state in states.items() if state.ended and not state.queued}
    return ", ".join(f"{name} is {state}" for name, state in ended.items() if state != "FINISHED")


def evaluations_of(run: Run, queue: Queue) -> list[tuple[Owed, State]]:
    """The evaluations left to jobs of their own that have no results yet, by step; OWED before their job."""
    found = sorted([*owed_by(run), *failed_of(run)], key=lambda owed: owed.step)
    return [(owed, _of_evaluation(owed, state_of(owed.job, queue))) for owed in found]


def _of_evaluation(owed: Owed, state: State) -> State:
    if state.name != "NEW":
        return state
    return State("OWED" if owed.mark.exists() else "CANCELLED")


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
