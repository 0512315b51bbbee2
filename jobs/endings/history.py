"""What earlier endings left in the run folder: verdicts, and jobs that still run. No torch."""

from __future__ import annotations

import time
from typing import Any

from clipcluster.runs import files
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from clipcluster.runtime.job_id import local_job_runs
from tools.slurm import ENDED, Slurm, SlurmMissing, SlurmRefused, SlurmUnavailable

WRITER = "verdict"  # of events-verdict.jsonl: the batch script, or the local process
FINAL = frozenset({"finish", "cancel", "stop", "fail"})
VERDICTS = FINAL | {"note", "requeue"}
SILENT_SECONDS = 600.0  # how long a SLURM without an answer is asked: its controller may be restarted
ASK_SECONDS = 5.0  # between two questions about another job


def batch_events(attempt: Attempt) -> list[dict[str, Any]]:
    """What the batch side wrote about an attempt, in order."""
    return files.read_lines(attempt.path / f"events-{WRITER}.jsonl")


def last_verdict(attempt: Attempt) -> dict[str, Any] | None:
    """The attempt's verdict, or None while it has none."""
    verdicts = [event for event in batch_events(attempt) if event.get("event") in VERDICTS]
    return verdicts[-1] if verdicts else None


def earlier(run: Run, attempt: Attempt) -> list[dict[str, Any]]:
    """Verdicts of the same job's attempts before this one, the newest first; those lost say nothing."""
    attempts = [each for each in run.attempts() if each.number < attempt.number and each.job == attempt.job]
    verdicts = [last_verdict(each) or {} for each in reversed(attempts)]
    return [verdict for verdict in verdicts if "ending" in verdict]


def job_runs(run: Run, job_id: str, slurm: Slurm) -> bool:
    """Whether a job still has processes that may write to the run.

    A job that cannot be looked up from here (on another machine, or SLURM does not answer, asked again for
    SILENT_SECONDS) counts as running until the run folder says that it ended.
    """
    if job_id.startswith("local-"):
        runs = local_job_runs(job_id)
        return _not_ended(run, job_id) if runs is None else runs
    deadline = time.monotonic() + SILENT_SECONDS
    while True:
        try:
            state = slurm.job(job_id)
        except (SlurmMissing, SlurmRefused):
            return _not_ended(run, job_id)
        except SlurmUnavailable:
            if not _not_ended(run, job_id):
                return False
            if time.monotonic() > deadline:
                return True
            time.sleep(ASK_SECONDS)
        else:
            return state is not None and state.state not in ENDED and state.state != "PENDING"


def _not_ended(run: Run, job_id: str) -> bool:
    if job_id in run.cancelled_jobs():
        return False
    attempts = [attempt for attempt in run.attempts() if attempt.job == job_id]
    if not attempts:
        return True
    verdict = last_verdict(attempts[-1])
    if verdict is None:  # started by hand: there is no verdict, and the outcome decides
        return not (job_id.startswith("local-") and attempts[-1].outcome())
    return verdict["event"] not in FINAL
