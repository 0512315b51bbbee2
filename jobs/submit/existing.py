"""What a submission makes of a run that exists: it is running, it has ended, or its job is still ending."""

from __future__ import annotations

import time
from collections.abc import Callable

from clipcluster.errors import UserError
from clipcluster.runs.folder import Run
from clipcluster.runs.names import as_typed
from jobs import submissions
from jobs.state import Queue, State, state_of

ENDING_SECONDS = 600.0  # how long a submission waits for a job that is still ending
Say = Callable[[str], None]


def running_or_finished(run: Run, say: Say, *, wait: bool, dry_run: bool) -> State | None:
    """The state of a run that needs no submission; None where one is due.

    A job that is still ending, or may still appear, is waited for where `wait` says so. A job whose submitter
    died is recorded, but by a dry run. Raises UserError where nobody can know, or there is no waiting.
    """
    deadline = time.monotonic() + ENDING_SECONDS
    waiting = False
    while run.exists():
        state = state_of(run, Queue())
        if not state.queued:
            return _ended(run, state, say)
        if state.name in ("RUNNING", "PENDING"):
            if state.job and not dry_run:
                submissions.adopt(run, state.job)
            say(f"{run.name} is {state}, as job {state.job}")
            return state
        ending = f"job {state.job} is still ending ({state.name})"
        what = ending if state.job else f"an earlier submission was interrupted ({state})"
        if not wait or dry_run or time.monotonic() > deadline:
            raise UserError(f"{run.name}: {what}. Submit again in a moment, or with --follow, which waits.")
        if not waiting:
            say(f"{run.name}: {what}; waiting for it")
            waiting = True
        time.sleep(1.0)
    return None


def _ended(run: Run, state: State, say: Say) -> State | None:
    if state.name == "FINISHED":
        say(f"{run.name} is finished; see: clipcluster status {as_typed(run)}")
        return state
    if state.name == "UNKNOWN":
        raise UserError(
            f"{run.name}: {state.detail}. Submit from a machine that reaches SLURM; or, knowing that the job "
            f"has ended: clipcluster cancel {as_typed(run)}"
        )
    if state.name != "NEW":
        say(f"{run.name} was {state}: it resumes from its last checkpoint")
    return None
