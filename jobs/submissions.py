"""What was submitted for a run: `submitit/jobs.jsonl` has an intent before each launch, its answer after it.

A process that dies between the two leaves an intent without an answer: a job may exist that no line names.
"""

from __future__ import annotations

import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcluster.runs import files
from clipcluster.runs.folder import Run
from clipcluster.runs.sweeps import array_folder, membership
from clipcluster.runtime.job_id import local_job_runs

FILE = "jobs.jsonl"
SETTLE_SECONDS = 60.0  # how long after its intent a job may still appear although its submitter died


@dataclass(frozen=True)
class Intent:
    """A launch that was begun: its token, the executor ("slurm", "local"), `time` in seconds since 1970.

    Of a member of an array the `task`, its number there, and the `comment` of the array's job. Of a run that
    waits for its turn on this machine `queue`, the job id of the process that will start it; and `taken` once
    that does.
    """

    launch: str
    executor: str
    code: str
    host: str
    time: float
    comment: str = ""
    task: int | None = None
    queue: str = ""
    taken: str = ""

    @property
    def settled(self) -> bool:
        """Whether a job of this launch would be known by now."""
        if self.queue:
            return not self.waits
        return time.time() - self.time > SETTLE_SECONDS

    @property
    def waits(self) -> bool:
        """Whether a process of this machine will start the run when its turn comes."""
        return bool(self.queue and local_job_runs(self.queue))

    @property
    def waits_elsewhere(self) -> bool:
        """Whether a process of another machine may do so, which cannot be asked here."""
        return bool(self.queue) and local_job_runs(self.queue) is None


def intend(run: Run, executor: str, code: str, **more: Any) -> Intent:
    """Record, durably, that a job is about to be launched; `more` are other fields of the intent.

    What died on this machine is marked as ended before a job of SLURM, which would wait for it.
    """
    run.submitit.mkdir(exist_ok=True)
    if executor == "slurm":  # a node cannot know that a process of this machine has died
        local = [job for job in job_ids(run) if job.startswith("local-")]
        run.mark_cancelled([job for job in local if local_job_runs(job) is False])
    intent = Intent(secrets.token_hex(4), executor, code, socket.gethostname(), round(time.time(), 3), **more)
    record(run, intent)
    files.fsync_folder(run.submitit)
    return intent


def record(run: Run, intent: Intent, **answer: str) -> None:
    """Record the `job` that a launch made, or why it was `refused` and made none."""
    files.append_lines(run.submitit / FILE, [{**vars(intent), **answer}], durable=True)


def settle(run: Run, intent: Intent, **answer: str) -> bool:
    """Record an answer that two processes may give, `taken` or `refused`; whether this one came first."""
    record(run, intent, **answer)
    lines = files.read_lines(run.submitit / FILE)
    first = [line for line in lines if line.get("launch") == intent.launch][1]
    return all(first.get(name) == value for name, value in answer.items())


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


def last_wait(run: Run) -> dict[str, Any] | None:
    """The last line, where it is of a launch for which the run waited on this machine, `refused` or not."""
    lines = files.read_lines(run.submitit / FILE)
    return lines[-1] if lines and lines[-1].get("queue") else None


def queues(run: Run) -> set[str]:
    """The processes of this machine that ever had the run wait for its turn, as job ids."""
    return {line["queue"] for line in files.read_lines(run.submitit / FILE) if line.get("queue")}


def log_folder(run: Run, job: str) -> Path:
    """Where submitit's files of a job are: in the run's folder, of a member of an array in its sweep's."""
    sweep = None if job.startswith("local-") or "_" not in job else membership(run)
    return array_folder(sweep["sweep"], run.path.parent) / "submitit" if sweep else run.submitit


def unanswered(run: Run) -> Intent | None:
    """The last launch, if no job and no refusal was recorded for it, and no attempt was claimed since."""
    lines = files.read_lines(run.submitit / FILE)
    if not lines or "launch" not in lines[-1] or "job" in lines[-1] or "refused" in lines[-1]:
        return None
    intent = Intent(**lines[-1])
    newest = run.newest()
    claimed = newest.claim().get("time", 0) if newest else 0
    return intent if claimed < intent.time else None
