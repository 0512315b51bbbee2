"""One rank of a run: opens its attempt, keeps its log, runs the trainee, and says how it ended.

Nothing here loads torch, so that a trainee without torch ends by the same rules as a training.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

from clipcluster.errors import UserError
from clipcluster.rank.claiming import open_attempt
from clipcluster.rank.ending import raised, returned
from clipcluster.rank.output import announce, log_to, redirect, say_ending
from clipcluster.runs.folder import Run
from clipcluster.runtime.environment import ATTEMPT, node_name, share_cores
from clipcluster.runtime.job_id import local_job_runs
from clipcluster.runtime.launch import Launch
from clipcluster.runtime.outcome import Outcome
from clipcluster.runtime.stop import Stop


def serve(
    run_dir: Path | str,
    trainee: str,
    stop: Stop,
    *,
    still_running: Callable[[str], bool] | None = None,
) -> int:
    """Run `trainee` ("package.module:function") as this process's rank of the run; returns the exit code.

    The trainee is called with (run, attempt, launch, stop) and returns how it ended. From the claim on,
    standard output and error go to `attempts/N/rank-R.out`, those of C libraries and child processes too. The
    event `start` is written before the trainee is imported.

    The attempt is $CLIPCLUSTER_ATTEMPT where the batch script claimed it. Under torchrun, or alone, rank 0
    claims and tells the others (`still_running` says whether another job still runs; by default this
    machine's processes are asked). The caller flushes its streams and leaves through `os._exit` with the
    code: 2 where the run cannot be joined, else a value of `Outcome`.
    """
    share_cores()
    run = Run(run_dir)
    try:
        launch = Launch.from_environment()
        attempt = open_attempt(run, launch, still_running or _runs_here)
    except UserError as error:
        print(f"clipcluster: {error}", file=sys.stderr, flush=True)
        return 2
    if attempt is None:
        print(f"{run.name} is finished already: nothing to do", flush=True)
        return int(Outcome.FINISHED)
    writer = f"rank-{launch.rank}"
    terminal = announce(run, attempt) if ATTEMPT not in os.environ and launch.rank == 0 else None
    try:
        attempt.check()
        redirect(attempt.path / f"{writer}.out")
        log_to(sys.stdout, launch.rank)
        here = {"host": socket.gethostname(), "node": node_name(), "pid": os.getpid()}
        attempt.event("start", writer=writer, rank=launch.rank, **here)
        outcome = resolve_name(trainee)(run, attempt, launch, stop)
        code = returned(Outcome(outcome), attempt, launch, stop)
    except BaseException as error:
        code = raised(error, attempt, launch)
    if terminal is not None:
        say_ending(terminal, run, attempt, code)
    return code


def _runs_here(job_id: str) -> bool:
    """Whether a process of this machine still runs; a job that it cannot know of counts as running."""
    return local_job_runs(job_id) is not False
