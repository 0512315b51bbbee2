"""Claiming the next attempt of a run, before any rank starts. Standard library only."""

from __future__ import annotations

import socket

from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from jobs.endings import history
from jobs.endings.log import marker, say
from tools.slurm import Slurm


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
