"""Runs that wait for their turn on this machine: a process starts them, so many at a time.

    python -m jobs.submit.waiting PARALLEL N TRAINEE RUN_DIR …   no other starts before the first N have ended

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
from clipcluster.runs.chains import runs_before
from clipcluster.runs.folder import Run
from clipcluster.runtime.job_id import local_job_id, local_job_runs
from jobs import submissions
from jobs.endings.log import say
from jobs.state import Queue, state_of, unfinished_before
from jobs.submit import launch, parameters
from jobs.submit.prepared import Prepared
from jobs.submit.recorded import launched

POLL_SECONDS = 0.5


def hand_over(
    members: Sequence[Prepared], logs: Path, *, parallel: int, trainee: str, behind: Sequence[Run] = ()
) -> None:
    """Start the process, and return once all members wait for it or were started. Raises UserError.

    None starts before the runs `behind` have ended.
    """
    paths = [str(member.run.path) for member in members]
    before = [str(run.path) for run in behind]
    logs.mkdir(parents=True, exist_ok=True)
    words = [str(parallel), str(len(before)), trainee, *before, *paths]
    pid = launch.detached(logs, members[0].code, __name__, *words)
    process = local_job_id(pid)
    deadline = time.monotonic() + launch.START_SECONDS
    while not all(process in submissions.queues(member.run) for member in members):
        log = logs / launch.LOCAL_LOG
        if local_job_runs(process) is False:
            said = "\n".join(log.read_text(errors="replace").splitlines()[-3:])
            raise UserError(f"the runs could not be started on this machine:\n{said}\nSee {log}")
        if time.monotonic() > deadline:
            raise UserError(
                f"the process that is to start the runs has not begun within {launch.START_SECONDS:g} s; it "
                f"may still start them: look with clipcluster status before you submit again, and see {log}"
            )
        time.sleep(0.05)


def main(parallel: int, trainee: str, runs: Sequence[Run], behind: Sequence[Run]) -> None:
    """Start the runs in their order, and return when the last one was started."""
    process = local_job_id()
    intents = [submissions.intend(run, "local", str(run.settings()["code"]), queue=process) for run in runs]
    running: list[str] = []
    for run, intent in zip(runs, intents, strict=True):
        before = [*behind, *runs_before(run)]
        while len(running) >= parallel or not all(map(_is_over, before)):
            time.sleep(POLL_SECONDS)
            running = [job for job in running if local_job_runs(job)]
            if not _waits(run, process):
                break
        if not _waits(run, process):
            continue
        if unfinished := unfinished_before(run, Queue()):
            submissions.settle(run, intent, refused=f"what comes first did not finish: {unfinished}")
        elif submissions.settle(run, intent, taken=process):
            try:
                running.append(_start(run, trainee))
            except (UserError, OSError) as error:  # the others may start all the same
                say(f"{run.name} could not be started: {error}")
                submissions.record(run, intent, refused=f"it could not be started: {error}")


def _waits(run: Run, process: str) -> bool:
    """Whether the run still waits for this process."""
    intent = submissions.unanswered(run)
    return intent is not None and intent.queue == process


def _is_over(run: Run) -> bool:
    """Whether the run has ended, in whatever way."""
    state = state_of(run, Queue())
    return state.ended and not state.queued


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
    first, given = int(sys.argv[2]), [Run(path) for path in sys.argv[4:]]
    main(int(sys.argv[1]), sys.argv[3], given[first:], given[:first])
