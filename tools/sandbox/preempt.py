"""Evicting a running job of a sandbox by a real one of higher priority, and letting it start again."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clipcluster.errors import UserError
from tools.sandbox.config import Sandbox
from tools.sandbox.sandbox import POLL_SECONDS, find
from tools.slurm import RUNNING, JobState, SlurmRefused

# A job that starts again in the second of its end is refused its steps: its nodes revoked it by the second.
SETTLE_SECONDS = 1.5
START_SECONDS = 15  # from a run's submission to the claim of its attempt
JOB_ID = re.compile(r"\d+(_\d+)?")


@dataclass(frozen=True)
class Preemption:
    """What became of a job that was preempted."""

    job_id: str
    nodes: tuple[str, ...]
    requeued: bool  # False: it ended instead, as `state` says
    state: str
    evicted_after: float  # seconds from the submission of the high-priority job until this one had left


def preempt(folder: Path, job: str | Path, *, come_back: bool = True, hold_seconds: float = 0) -> Preemption:
    """Evict a running job by a real one of higher priority on the same nodes, and let it come back.

    `job` is a job id ("17", "17_3" for a member of an array) or a run folder. The high-priority job holds the
    nodes `hold_seconds` longer than the eviction takes, then ends. Whole nodes are taken: jobs that share one
    go too. With `come_back` the requeued jobs may start at once instead of about two minutes later. A run
    that was only just submitted is given `START_SECONDS` to claim its attempt. Raises UserError when the job
    is not running in `low`, or has not left its nodes long after the grace time.
    """
    sandbox = find(folder)
    slurm = sandbox.slurm
    before = _job_to_evict(sandbox, job)
    neighbours = _neighbours(sandbox, before)
    begin = time.monotonic()
    high = slurm.submit(
        "--partition=high",
        "--exclusive",
        f"--nodes={len(before.nodes)}",
        f"--nodelist={','.join(before.nodes)}",
        "--job-name=preempt",
        "--time=10",
        "--output=/dev/null",
        "--wrap=sleep 600",
    )
    try:
        after = _await_eviction(sandbox, before, begin)
        evicted = time.monotonic() - begin
        for neighbour in neighbours:
            _await_eviction(sandbox, neighbour, begin)
        time.sleep(hold_seconds)
    finally:
        slurm.cancel([high])
    _await_gone(sandbox, high)
    if come_back:
        for evictee in (before, *neighbours):
            with suppress(UserError):  # it ended instead
                release(folder, evictee.job_id)
    return Preemption(before.job_id, before.nodes, not after.ended, after.state, evicted)


def release(folder: Path, job: str | Path, *, seconds: float = 10) -> None:
    """Let a requeued job start now instead of about two minutes later; nothing if it has started already.

    Returns once it runs or waits for something else than its begin time, after `seconds` at most. Raises
    UserError if it has ended or is unknown.
    """
    slurm = find(folder).slurm
    job_id = job_of(job)
    deadline = time.monotonic() + seconds
    asked = False
    while time.monotonic() < deadline:
        state = slurm.job(job_id)
        if state is None or state.ended:
            raise UserError(
                f"job {job_id} will not run again: {state.state if state else 'unknown to SLURM'}"
            )
        waits = state.state == "PENDING"
        if state.running or (waits and asked and state.reason != "BeginTime"):
            return
        if waits:
            if not asked:
                time.sleep(SETTLE_SECONDS)
            with suppress(SlurmRefused):  # it started between the two calls
                slurm.release(job_id)
            asked = True
        time.sleep(3 * POLL_SECONDS)


def job_of(job: str | Path) -> str:
    """The job id itself, or the job of a run folder's newest attempt; raises UserError for anything else."""
    if JOB_ID.fullmatch(str(job)):
        return str(job)
    from clipcluster.runs.folder import Run

    path = Path(job)
    if not path.is_dir():
        raise UserError(f"{job} is neither a job id (17, or 17_3 for a member of an array) nor a run folder")
    attempt = Run(path).newest()
    if attempt is None or attempt.job is None:
        raise UserError(f"run {path} has not started: no attempt has claimed it yet; try again once it runs")
    return attempt.job


def _running_job(sandbox: Sandbox, job_id: str) -> JobState:
    state = sandbox.slurm.job(job_id)
    if state is None:
        raise UserError(f"the sandbox in {sandbox.folder} has no job {job_id}")
    if not state.running:
        raise UserError(f"job {job_id} is {state.state}; only a running job can be preempted")
    if state.partition != "low":
        raise UserError(f"job {job_id} runs in partition {state.partition}; only those in low are preempted")
    return state


def _job_to_evict(sandbox: Sandbox, job: str | Path) -> JobState:
    """The running job; where it belongs to a run whose job is only starting, it is waited for."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return _running_job(sandbox, job_of(job))
        except UserError:
            name = Path(os.path.realpath(job)).name
            starting = not JOB_ID.fullmatch(str(job)) and any(
                queued.name == name and queued.state != "COMPLETING" for queued in sandbox.slurm.queue()
            )
            if not starting or time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)


def _neighbours(sandbox: Sandbox, job: JobState) -> list[JobState]:
    """The other running jobs of low on any of the job's nodes."""
    ids = [
        other.job_id
        for other in sandbox.slurm.queue()
        if other.job_id != job.job_id
        and other.partition == "low"
        and other.state in RUNNING
        and set(other.nodes) & set(job.nodes)
    ]
    return [state for state in map(sandbox.slurm.job, ids) if state is not None]


def _await_eviction(sandbox: Sandbox, before: JobState, begin: float) -> JobState:
    """Wait until the job has left its nodes; the state it then has: PENDING, or an ended one."""
    limit = sandbox.grace_seconds + sandbox.kill_wait_seconds + 60
    while True:
        state = sandbox.slurm.job(before.job_id)
        if state is None:
            raise UserError(f"SLURM no longer knows job {before.job_id}")
        if state.ended or state.state == "PENDING":
            return state
        if state.restarts > before.restarts and state.running:
            return state  # requeued and back already, on other nodes
        if time.monotonic() - begin > limit:
            raise UserError(
                f"job {before.job_id} has not left its nodes {limit} s after a job of higher priority "
                f"asked for them: {state.state}, PreemptTime={state.preempt_time}"
            )
        time.sleep(POLL_SECONDS)


def _await_gone(sandbox: Sandbox, job_id: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while sandbox.slurm.queue(job_ids=[job_id]) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
