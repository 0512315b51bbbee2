"""What earlier endings left in the run folder: verdicts, blamed nodes. No torch."""

from __future__ import annotations

from collections import Counter
from typing import Any

from clipcluster.runs import files
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from clipcluster.runtime.job_id import local_job_runs
from jobs.endings.verdict import Raised
from tools.slurm import ENDED, Slurm, SlurmRefused, SlurmUnavailable

WRITER = "verdict"  # of events-verdict.jsonl: the batch script, or the local process
VERDICTS = frozenset({"finish", "cancel", "stop", "note", "requeue", "fail"})
FINAL = frozenset({"finish", "cancel", "stop", "fail"})
NEUTRAL = frozenset({"preempted", "requeued already"})  # never count against a run, and break no row


def batch_events(attempt: Attempt) -> list[dict[str, Any]]:
    """What the batch side wrote about an attempt, in order."""
    return files.read_lines(attempt.path / f"events-{WRITER}.jsonl")


def last_verdict(attempt: Attempt) -> dict[str, Any] | None:
    """The attempt's verdict, or None while it has none."""
    verdicts = [event for event in batch_events(attempt) if event.get("event") in VERDICTS]
    return verdicts[-1] if verdicts else None


def fruitless(run: Run, attempt: Attempt, checkpoint: int | None) -> int:
    """Endings in a row just before `attempt` that count, with no newer checkpoint than `checkpoint` since.

    Only those of the attempt's own job: who submits again begins a new row.
    """
    count = 0
    for verdict in _earlier(run, attempt):
        if verdict["ending"] in NEUTRAL:
            continue
        then = verdict.get("checkpoint")
        if not verdict.get("counts") or (checkpoint is not None and (then is None or checkpoint > then)):
            break
        count += 1
    return count


def broken_before(run: Run, attempt: Attempt) -> bool:
    """Whether the ending just before `attempt`, of the same job, was one in which no rank started."""
    endings = [verdict["ending"] for verdict in _earlier(run, attempt) if verdict["ending"] not in NEUTRAL]
    return bool(endings) and endings[0] == "never started"


def raised_before(run: Run, attempt: Attempt, checkpoint: int | None) -> list[Raised]:
    """What ranks raised in the same job's ending just before; nothing where a checkpoint is newer."""
    for verdict in _earlier(run, attempt):
        if verdict["ending"] not in NEUTRAL:
            same = verdict.get("checkpoint") == checkpoint
            return [Raised(**each) for each in verdict.get("raised", [])] if same else []
    return []


def blamed_twice(run: Run, attempt: Attempt, node: str) -> list[str]:
    """The nodes to exclude when `node` is blamed for this attempt's crash: those blamed twice by now."""
    counts = Counter(verdict.get("blamed") for verdict in _earlier(run, attempt))
    counts[node] += 1
    return sorted(name for name, count in counts.items() if name and count >= 2)


def _earlier(run: Run, attempt: Attempt) -> list[dict[str, Any]]:
    """Verdicts of the same job's attempts before this one, the newest first; those lost say nothing."""
    found = []
    for earlier in reversed(run.attempts()):
        if earlier.number < attempt.number and earlier.job == attempt.job:
            verdict = last_verdict(earlier)
            if verdict is not None and "ending" in verdict:
                found.append(verdict)
    return found


def job_runs(run: Run, job_id: str, slurm: Slurm) -> bool:
    """Whether a job still has processes that may write to the run.

    A job that cannot be looked up from here (on another machine, or SLURM does not answer) counts as running
    until the run folder says that it ended.
    """
    if job_id.startswith("local-"):
        runs = local_job_runs(job_id)
        return _not_ended(run, job_id) if runs is None else runs
    try:
        state = slurm.job(job_id)
    except (SlurmUnavailable, SlurmRefused):
        return _not_ended(run, job_id)
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
