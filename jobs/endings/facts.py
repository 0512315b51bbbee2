"""What the verdict rests on: the run folder, the logs, and what SLURM says. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from clipcluster.runs import files
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.checkpoints import newest_complete
from clipcluster.runs.folder import Run
from clipcluster.runtime.environment import EARLY_SECONDS, LEAD, LOGS
from clipcluster.runtime.job_id import slurm_job_id
from jobs.endings import history
from jobs.endings.log import marker, say, tail
from jobs.endings.verdict import Facts, Job, error_lines, memory_line
from tools.slurm import JobState, Slurm, SlurmRefused, SlurmUnavailable

NEUTRAL = frozenset({"preempted", "requeued already"})  # never count against a run, and break no row
RAISED = 8  # of how many ranks the exception is kept: their messages may differ


def on_slurm(
    run: Run, attempt: Attempt, code: int, job: JobState | None, environ: Mapping[str, str]
) -> Facts:
    """All facts of an attempt whose srun left with `code`; `environ` is the batch script's."""
    logs = Path(environ.get(LOGS) or run.submitit)
    seen = gather(run, attempt, code, job_id=slurm_job_id(environ), logs=logs)
    return replace(
        seen,
        job=as_seen(job),
        restart_count=int(environ.get("SLURM_RESTART_COUNT") or 0),
        time_nearly_over=seen.time_nearly_over or _nearly_over(job, environ),
    )


def gather(run: Run, attempt: Attempt, code: int, *, job_id: str, logs: Path) -> Facts:
    """The facts that the run folder and the logs tell; the scheduler's are for the caller."""
    first = logs / f"{job_id}_0_log.err"
    others = [path for path in sorted(logs.glob(f"{job_id}_*_log.err")) if path != first]
    events = [event for path in attempt.path.glob("events-rank-*.jsonl") for event in files.read_lines(path)]
    checkpoint = newest_complete(run.checkpoints)
    earlier = [each for each in history.earlier(run, attempt) if each["ending"] not in NEUTRAL]
    before = earlier[0] if earlier else {}
    log = tail([first], after=marker(attempt), lines=1000)
    return Facts(
        code=code,
        superseded=attempt.is_stale(),
        said=attempt.outcome(),
        cancelled=job_id in run.cancelled_jobs(),
        checkpoint=checkpoint,
        started=any(event.get("event") == "start" for event in events),
        time_nearly_over=any(event.get("time_limit") for event in events),
        raised=_raised(events),
        stalled=next((event for event in events if event.get("event") == "stalled"), None),
        raised_before=before.get("raised", []) if before.get("checkpoint") == checkpoint else [],
        fruitless=_fruitless(earlier, checkpoint),
        broken_before=before.get("ending") == "never started",
        errors=error_lines(log),
        memory=memory_line(log),
        tail=tail([*others[:1], first], after=marker(attempt)),
    )


def _raised(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first exceptions with which ranks ended; those that merely lost their peers raised none."""
    failed = [event for event in events if event.get("event") == "fail" and event.get("outcome") == "error"]
    failed.sort(key=lambda event: float(event.get("time", 0)))
    return [{"step": event.get("step"), "signature": event.get("signature", "")} for event in failed[:RAISED]]


def _fruitless(earlier: Sequence[Mapping[str, Any]], checkpoint: int | None) -> int:
    """How many verdicts in a row count, with no newer checkpoint than `checkpoint` since."""
    count = 0
    for verdict in earlier:
        then = verdict.get("checkpoint")
        if not verdict.get("counts") or (checkpoint is not None and (then is None or checkpoint > then)):
            break
        count += 1
    return count


def ask(slurm: Slurm, job_id: str) -> JobState | None:
    """The job as SLURM sees it, or None where it gives no answer."""
    try:
        return slurm.job(job_id)
    except (SlurmUnavailable, SlurmRefused) as error:
        say(f"SLURM gives no answer about job {job_id}: {error}")
        return None


def as_seen(job: JobState | None) -> Job | None:
    """What of SLURM's answer the verdict rests on."""
    if job is None:
        return None
    over = job.reason == "TimeLimit" or job.state == "TIMEOUT"
    return Job(not job.leaving, over, job.restarts, not job.leaving and job.preempt_time is not None)


def _nearly_over(job: JobState | None, environ: Mapping[str, str]) -> bool:
    lead = float(environ.get(LEAD) or 0)
    if job is None or job.end_time is None or not lead:
        return False
    return (job.end_time - datetime.now()).total_seconds() <= lead + EARLY_SECONDS


def down(slurm: Slurm, job: JobState | None) -> list[str]:
    """The job's nodes that SLURM calls down or that answer no more."""
    if job is None:
        return []
    try:
        nodes = {node.name: node for node in slurm.nodes()}
    except (SlurmUnavailable, SlurmRefused):
        return []
    mine = [nodes[name] for name in job.nodes if name in nodes]
    return [node.name for node in mine if not node.responding or node.state in ("down", "fail", "failing")]
