"""The batch side of an attempt: it claims before the ranks start, and decides after they ended.

Standard library, `clipcluster.runs` and what asks SLURM: a scancel gives the verdict little time.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from clipcluster.errors import StaleAttempt
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from clipcluster.runtime.environment import LEAD, LOGS
from clipcluster.runtime.job_id import slurm_job_id
from clipcluster.runtime.stop import Outcome
from jobs.endings import history
from jobs.endings.verdict import Facts, Job, Said, Verdict, blamed, decide, error_lines
from tools.slurm import JobState, Slurm, SlurmRefused, SlurmUnavailable

EARLY_SECONDS = 90  # SLURM may send that signal up to a minute early, and looks every half minute
REFUSED_SECONDS = 30.0  # how long a requeue that SLURM refuses is tried again
EXCLUDE_SECONDS = 3.0


def say(text: str) -> None:
    """One line for the job's own log; standard output belongs to the attempt's number."""
    print(f"clipcluster: {text}", file=sys.stderr, flush=True)


def marker(attempt: Attempt) -> str:
    """The line that opens an attempt in the job's log, which all attempts of a job share."""
    return f"attempt {attempt.number} of {attempt.run.name} begins"


def claim(run: Run, job_id: str, slurm: Slurm) -> Attempt | None:
    """The attempt for this job; None where the run is finished, or cancelled for this job.

    Raises AlreadyOwned, naming the job that owns the run and still runs.
    """
    if run.finished():
        say(f"{run.name} is finished already: nothing to do")
        return None
    if job_id in run.cancelled_jobs():
        say(f"{run.name} was cancelled: job {job_id} does nothing")
        return None
    attempt = run.claim(
        job_id,
        host=socket.gethostname(),
        still_running=lambda other: history.job_runs(run, other, slurm),
    )
    say(f"{marker(attempt)} (job {job_id} on {socket.gethostname()})")
    return attempt


def gather(run: Run, attempt: Attempt, code: int, *, job_id: str, logs: Path) -> Facts:
    """The facts of an attempt that the run folder and the logs tell; the scheduler's are for the caller."""
    first = logs / f"{job_id}_0_log.err"
    others = [path for path in sorted(logs.glob(f"{job_id}_*_log.err")) if path != first]
    return Facts(
        code=code,
        superseded=attempt.is_stale(),
        said=_said(attempt),
        cancelled=job_id in run.cancelled_jobs(),
        started=any(
            b'"event":"start"' in path.read_bytes() for path in attempt.path.glob("events-rank-*.jsonl")
        ),
        fruitless=history.fruitless(run, attempt, history.newest_checkpoint(run)),
        broken_before=history.broken_before(run, attempt),
        errors=error_lines(history.tail([first], after=marker(attempt), lines=1000)),
        tail=history.tail([*others[:1], first], after=marker(attempt)),
    )


def _said(attempt: Attempt) -> Said | None:
    """What the ranks said of their ending, if they came to it."""
    outcome = attempt.outcome()
    if outcome is None:
        return None
    speaker = f" (rank {outcome['rank']} on {outcome['host']})" if outcome["outcome"] == "failed" else ""
    return Said(outcome["outcome"], outcome["code"], f"{outcome['reason']}{speaker}", outcome["advice"])


def _seen(job: JobState | None) -> Job | None:
    if job is None:
        return None
    running = job.state == "RUNNING"
    over = job.reason == "TimeLimit" or job.state == "TIMEOUT"
    return Job(running, over, job.restarts, running and job.preempt_time is not None)


def _nearly_over(job: JobState | None, environ: Mapping[str, str]) -> bool:
    lead = float(environ.get(LEAD) or 0)
    if job is None or job.end_time is None or not lead:
        return False
    return (job.end_time - datetime.now()).total_seconds() <= lead + EARLY_SECONDS


def ask(slurm: Slurm, job_id: str) -> JobState | None:
    """The job as SLURM sees it, or None where it gives no answer."""
    try:
        return slurm.job(job_id)
    except (SlurmUnavailable, SlurmRefused) as silence:
        say(f"SLURM does not tell of job {job_id}: {silence}")
        return None


def conclude(run: Run, attempt: Attempt, code: int, slurm: Slurm, environ: Mapping[str, str]) -> int:
    """Decide, write the verdict down, act on it; returns the batch script's exit code."""
    job_id = slurm_job_id(environ)
    job = ask(slurm, job_id)
    logs = Path(environ.get(LOGS) or run.submitit)
    facts = replace(
        gather(run, attempt, code, job_id=job_id, logs=logs),
        job=_seen(job),
        restart_count=int(environ.get("SLURM_RESTART_COUNT") or 0),
        time_nearly_over=_nearly_over(job, environ),
    )
    verdict = decide(facts)
    node = None
    if verdict.action == "requeue" and verdict.ending == "crashed":
        node = blamed(facts.errors, _down(slurm, job))
    if not record(run, attempt, verdict, job_id, blamed=node):
        return int(Outcome.STALE)
    if verdict.action == "requeue":
        return _requeue(run, attempt, slurm, job, job_id, node)
    return verdict.code


def record(run: Run, attempt: Attempt, verdict: Verdict, job_id: str, *, blamed: str | None = None) -> bool:
    """Write the verdict to the attempt, and the mark it wants; False where another attempt took over."""
    say(
        f"attempt {attempt.number} of {run.name}: {verdict.ending} -> {verdict.action} ({verdict.code})"
        + (f": {verdict.reason}" if verdict.reason else "")
    )
    if verdict.action == "leave":
        return False
    fields = {
        "ending": verdict.ending,
        "code": verdict.code,
        "reason": verdict.reason,
        "advice": verdict.advice,
        "counts": verdict.counts,
        "checkpoint": history.newest_checkpoint(run),
    }
    if blamed:
        fields["blamed"] = blamed
    try:
        if verdict.mark:
            run.mark_cancelled([job_id])
        attempt.event(verdict.action, writer=history.WRITER, **fields)
    except StaleAttempt:
        return False
    except OSError as error:  # a full disk must not keep a run from coming back
        say(f"the verdict could not be written down: {error}")
    return True


def _down(slurm: Slurm, job: JobState | None) -> list[str]:
    """The job's nodes that SLURM calls down or that answer no more."""
    if job is None:
        return []
    try:
        nodes = {node.name: node for node in slurm.nodes()}
    except (SlurmUnavailable, SlurmRefused):
        return []
    mine = [nodes[name] for name in job.nodes if name in nodes]
    return [node.name for node in mine if not node.responding or node.state in ("down", "fail", "failing")]


def _requeue(
    run: Run, attempt: Attempt, slurm: Slurm, job: JobState | None, job_id: str, node: str | None
) -> int:
    deadline = time.monotonic() + REFUSED_SECONDS
    while True:
        try:
            slurm.requeue(job_id)
            break
        except (SlurmUnavailable, SlurmRefused) as refusal:
            if time.monotonic() >= deadline:
                say(f"SLURM did not requeue job {job_id}: {refusal}")
                attempt.event("requeue_refused", writer=history.WRITER, reason=str(refusal))
                return int(Outcome.STOPPED)
        time.sleep(1.0)
    if node and job:
        _exclude(slurm, job, job_id, history.blamed_twice(run, attempt, node))
    return int(Outcome.STOPPED)


def _exclude(slurm: Slurm, job: JobState, job_id: str, nodes: Sequence[str]) -> None:
    """Keep the pending job away from nodes, unless too few would be left for it to start at all."""
    excluded = sorted({*job.excluded, *nodes})
    if not nodes or excluded == sorted(job.excluded):
        return
    deadline = time.monotonic() + EXCLUDE_SECONDS
    while True:
        try:
            there = {name for part in slurm.partitions() if part.name == job.partition for name in part.nodes}
            if len(there - set(excluded)) < len(job.nodes):
                say(f"{', '.join(nodes)} blamed twice, but without it too few nodes would be left")
                return
            slurm.exclude(job_id, excluded)
            say(f"{', '.join(nodes)} blamed twice: excluded")
            return
        except (SlurmUnavailable, SlurmRefused) as refusal:
            if time.monotonic() >= deadline:
                say(f"SLURM did not exclude {', '.join(nodes)}: {refusal}")
                return
        time.sleep(0.2)
