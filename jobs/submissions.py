"""What was submitted for a run: `submitit/jobs.jsonl` has an intent before each launch, its answer after it.

A process that dies between the two leaves an intent without an answer: a job may exist that no line names.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
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
    that does. `attempts`: how many there were before; None in lines of versions that did not write it.
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
    attempts: int | None = None

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
    now, newest = round(time.time(), 3), run.newest()
    before = newest.number if newest else 0
    intent = Intent(secrets.token_hex(4), executor, code, socket.gethostname(), now, attempts=before, **more)
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
    """Every job that was submitted for the run or claimed it, by when it last did, the newest last.

    By the attempts there were, because the clocks of a cluster's machines may differ by minutes.
    """
    claims = [(attempt.number, attempt.claim()) for attempt in run.attempts()]
    places = dict[str, tuple[int, int]]()
    for place, line in enumerate(submissions(run), 1):
        places[line["job"]] = _attempts_before(line, claims), place
    places |= {claim["job"]: (number, 0) for number, claim in claims if claim.get("job")}
    return sorted(places, key=lambda job: places[job])


def _attempts_before(line: Mapping[str, Any], claims: Sequence[tuple[int, Mapping[str, Any]]]) -> int:
    """How many attempts there were when a job was submitted; by the clock where the line does not say it."""
    told, time_of_line = line.get("attempts"), line.get("time", 0.0)
    if isinstance(told, int):
        return told
    return max((number for number, claim in claims if claim.get("time", 0.0) <= time_of_line), default=0)


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
    claims = [(newest.number, newest.claim()) for newest in [run.newest()] if newest]
    claimed = any(number > _attempts_before(lines[-1], claims) for number, _ in claims)
    known = {field.name for field in fields(Intent)}  # a later version may write more
    return None if claimed else Intent(**{name: lines[-1][name] for name in known & lines[-1].keys()})
