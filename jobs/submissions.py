"""What was submitted for a run: `submitit/jobs.jsonl` has an intent before each launch, its answer after it.

A process that dies between the two leaves an intent without an answer: a job may exist that no line names.
"""

from __future__ import annotations

import secrets
import socket
import time
from dataclasses import dataclass
from typing import Any

from clipcluster.runs import files
from clipcluster.runs.folder import Run

FILE = "jobs.jsonl"
SETTLE_SECONDS = 60.0  # how long after its intent a job may still appear although its submitter died


@dataclass(frozen=True)
class Intent:
    """A launch that was begun: its token, the executor ("slurm", "local"), `time` in seconds since 1970."""

    launch: str
    executor: str
    code: str
    host: str
    time: float

    @property
    def settled(self) -> bool:
        """Whether a job of this launch would be known by now."""
        return time.time() - self.time > SETTLE_SECONDS


def intend(run: Run, executor: str, code: str) -> Intent:
    """Record, durably, that a job is about to be launched."""
    run.submitit.mkdir(exist_ok=True)
    intent = Intent(secrets.token_hex(4), executor, code, socket.gethostname(), round(time.time(), 3))
    record(run, intent)
    files.fsync_folder(run.submitit)
    return intent


def record(run: Run, intent: Intent, **answer: str) -> None:
    """Record the `job` that a launch made, or why it was `refused` and made none."""
    files.append_lines(run.submitit / FILE, [{**vars(intent), **answer}], durable=True)


def adopt(run: Run, job: str) -> None:
    """Record the job of a launch whose process died before it did; no line is needed for any other job."""
    intent = unanswered(run)
    if intent is not None and job not in job_ids(run):
        record(run, intent, job=job)


def submissions(run: Run) -> list[dict[str, Any]]:
    """What was submitted for a run, the oldest first: job, executor, code, time."""
    return [line for line in files.read_lines(run.submitit / FILE) if line.get("job")]


def job_ids(run: Run) -> list[str]:
    """Every job that was submitted for the run or claimed it, by when it last did, the newest last."""
    latest: dict[str, float] = {}
    for line in [*submissions(run), *(attempt.claim() for attempt in run.attempts())]:
        if line.get("job"):
            latest[line["job"]] = max(line.get("time", 0.0), latest.get(line["job"], 0.0))
    return sorted(latest, key=lambda job: latest[job])


def unanswered(run: Run) -> Intent | None:
    """The last launch, if no job and no refusal was recorded for it, and no attempt was claimed since."""
    lines = files.read_lines(run.submitit / FILE)
    if not lines or "launch" not in lines[-1] or "job" in lines[-1] or "refused" in lines[-1]:
        return None
    intent = Intent(**lines[-1])
    newest = run.newest()
    claimed = newest.claim().get("time", 0) if newest else 0
    return intent if claimed < intent.time else None
