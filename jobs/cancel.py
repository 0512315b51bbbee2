"""Ending a run for good: the mark first, so that whatever the job does next, no other attempt follows."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from clipcluster.errors import UserError
from clipcluster.runs.folder import Run
from clipcluster.runtime.job_id import local_job_runs
from jobs.state import Queue, evaluations_of, state_of
from jobs.submissions import adopt, job_ids, record, settle, unanswered
from tools.slurm import SlurmRefused, SlurmUnavailable


def cancel_all(runs: Sequence[Run], queue: Queue) -> list[str]:
    """End runs, those that wait first, so that none starts meanwhile; returns what was done, a line each.

    Raises UserError where jobs cannot be ended from here, once all others are.
    """
    waiting = [run for run in runs if state_of(run, queue).name == "PENDING"]
    ordered = [*waiting, *(run for run in runs if run not in waiting)]
    return end_each(partial(_lines, run, queue) for run in ordered)


def end_each(ends: Iterable[Callable[[], list[str]]]) -> list[str]:
    """Call all of them; the lines that they return. UserError, once all were called, where one raised it."""
    done, refused = [], []
    for end in ends:
        try:
            done += end()
        except UserError as refusal:
            refused.append(str(refusal))
    if refused:
        raise UserError("\n".join([*refused, *done]))
    return done


def _lines(run: Run, queue: Queue) -> list[str]:
    return [cancel(run, queue)]


def cancel(run: Run, queue: Queue) -> str:
    """End the run and its evaluations; returns what was done, a line each.

    Raises UserError where a job cannot be ended from here (the mark stands).
    """
    done = [_cancel(run, queue)]
    for owed, state in evaluations_of(run, queue):
        with contextlib.suppress(FileNotFoundError):  # its results have just come, or it was given up before
            owed.give_up()
        if state.queued:
            done.append(_cancel(owed.job, queue))
    return "\n".join(done)


def _cancel(run: Run, queue: Queue) -> str:
    """Bind the run's jobs in `marks/cancelled`, then end those that wait or run; returns what was done.

    A finished run stays finished. Raises UserError where the job cannot be ended from here (the mark stands).
    """
    state = state_of(run, queue)
    if state.name in ("FINISHED", "NEW"):
        return f"{run.name} is {state}: nothing to cancel"
    if state.name == "SUBMITTING":
        raise UserError(f"{run.name} is {state}. Cancel it in a minute: until then its job may appear.")
    intent = unanswered(run)
    if intent is not None and intent.waits:
        if not settle(run, intent, refused="cancelled"):
            raise UserError(f"{run.name} is just being started. Cancel it again in a moment.")
        run.mark_cancelled(job_ids(run))
        return f"{run.name}: cancelled before its turn came"
    if state.job:
        adopt(run, state.job)
    jobs = job_ids(run)
    run.mark_cancelled(jobs)
    if state.queued:
        ended = [job for job in jobs if _end(job, queue)]
        return f"{run.name}: cancelled {', '.join(ended)}"
    intent = unanswered(run)
    if intent is not None:
        record(run, intent, refused="cancelled")
    if state.name == "UNKNOWN":
        raise UserError(
            f"{run.name}: {state.detail}. The run is marked as cancelled, so that no attempt follows; "
            "end the job itself where it can be reached."
        )
    return f"{run.name} was {state} and has no job: marked as cancelled"


def _end(job: str, queue: Queue) -> bool:
    """End one job if it waits or runs; a local job passes TERM on to its ranks, which save and stop."""
    if job.startswith("local-"):
        if not local_job_runs(job):
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job.split("-")[-2]), signal.SIGTERM)
        return True
    if queue.job(job) is None:
        return False
    try:
        queue.slurm.cancel([job])
    except (SlurmUnavailable, SlurmRefused) as error:
        raise UserError(
            f"job {job} could not be ended ({error}). It is marked as cancelled, so that no attempt follows; "
            f"end it with: scancel {job}"
        ) from None
    return True
