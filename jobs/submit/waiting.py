"""Runs that wait for their turn on this machine: a process starts them, so many at a time.

    python -m jobs.submit.waiting PARALLEL TRAINEE RUN_DIR …

Each has an intent that names the process. A run whose intent was answered meanwhile (it was cancelled, or
submitted alone) is left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from clipcluster.errors import UserError
from clipcluster.recipe.load import from_run
from clipcluster.runs.folder import Run
from clipcluster.runtime.job_id import local_job_id, local_job_runs
from jobs import submissions
from jobs.endings.log import say
from jobs.state import Queue, state_of
from jobs.submit import launch, parameters
from jobs.submit.prepared import Prepared
from jobs.submit.recorded import launched

POLL_SECONDS = 0.5


def hand_over(members: Sequence[Prepared], logs: Path, *, parallel: int, trainee: str) -> None:
    """Start the process, and return once all members wait for it or were started. Raises UserError."""
    paths = [str(member.run.path) for member in members]
    logs.mkdir(parents=True, exist_ok=True)
    pid = launch.detached(logs, members[0].code, __name__, str(parallel), trainee, *paths)
    process = local_job_id(pid)
    deadline = time.monotonic() + launch.START_SECONDS
    while not all(process in submissions.queues(member.run) for member in members):
        if local_job_runs(process) is False or time.monotonic() > deadline:
            said = "\n".join((logs / launch.LOCAL_LOG).read_text(errors="replace").splitlines()[-3:])
            raise UserError(f"the runs could not be started on this machine:\n{said}")
        time.sleep(0.05)


def main(parallel: int, trainee: str, runs: Sequence[Run]) -> None:
    """Start the runs in their order, and return when the last one was started."""
    process = local_job_id()
    for run in runs:
        submissions.intend(run, "local", str(run.settings()["code"]), queue=process)
    running: list[str] = []
    for run in runs:
        first = [Run(path) for path in run.settings().get("after") or ()]
        while len(running) >= parallel or not all(map(_is_over, first)):
            time.sleep(POLL_SECONDS)
            running = [job for job in running if local_job_runs(job)]
            if not _waits(run, process):
                break
        if not _waits(run, process):
            continue
        if unfinished := _unfinished(first):
            intent = submissions.unanswered(run)
            assert intent is not None
            submissions.record(run, intent, refused=f"what comes first did not finish: {unfinished}")
            continue
        try:
            running.append(_start(run, trainee))
        except (UserError, OSError) as error:  # the others may start all the same
            say(f"{run.name} could not be started: {error}")


def _waits(run: Run, process: str) -> bool:
    """Whether the run still waits for this process."""
    intent = submissions.unanswered(run)
    return intent is not None and intent.queue == process


def _is_over(run: Run) -> bool:
    """Whether the run has ended, in whatever way."""
    state = state_of(run, Queue())
    return state.ended and not state.queued


def _unfinished(runs: Sequence[Run]) -> str:
    """Those that did not finish, and how they ended; empty where all finished."""
    states = {run.name: state_of(run, Queue()).name for run in runs}
    return ", ".join(f"{name} is {state}" for name, state in states.items() if state != "FINISHED")


def _start(run: Run, trainee: str) -> str:
    settings = run.settings()
    recipe = from_run(run.recipe(), settings)
    return launched(
        run,
        recipe.cluster,
        run.path / str(settings["code"]),
        "local",
        grace=parameters.grace_seconds(recipe.cluster, None),
        trainee=trainee,
        say=say,
        evaluations=recipe.evaluate.where == "job" and "step" not in settings,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], [Run(path) for path in sys.argv[3:]])
