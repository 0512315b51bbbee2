"""Jobs for the evaluations that a training owes (`evaluate.where: job`), started on the batch side.

python -m jobs.submit.evaluations RUN_DIR watch PARENT   beside the ranks, while the process PARENT lives:
                                                         the batch script or the local supervisor
python -m jobs.submit.evaluations RUN_DIR finish         once: after the ranks, and when a run is
                                                         submitted again

An evaluation's job has a run folder of its own below the training's: it is claimed, judged, requeued and
cancelled as any job. On SLURM several may run at once; on this machine one after the other.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from clipcluster.errors import UserError
from clipcluster.recipe.load import from_run
from clipcluster.runs.checkpoints import is_complete
from clipcluster.runs.evaluations import Owed, owe_failed, owed_by
from clipcluster.runs.folder import Run
from clipcluster.text import counted
from jobs.endings.log import say
from jobs.state import Queue, State, state_of
from jobs.submissions import submissions
from jobs.submit import launch, parameters
from jobs.submit.recorded import launched
from jobs.train import EVALUATOR
from tools.slurm import Slurm

LOOK_SECONDS, LOCAL_LOOK_SECONDS = 3.0, 0.5  # between two looks at what is owed
ASK_SECONDS = 60.0  # between two questions about jobs that are known
LAUNCHES = 3  # of one evaluation whose jobs left no verdict


def main(arguments: Sequence[str]) -> int:
    """See the top of this file."""
    run, command = Run(arguments[0]), arguments[1]
    if command == "watch":
        parent = int(arguments[2])  # given, since it may have ended before this line
        keep_started(run, lambda: os.getppid() == parent)
    elif command == "finish":
        keep_started(run, lambda: False)
    else:
        raise SystemExit(f"unknown: {command}")
    return 0


def keep_started(run: Run, training: Callable[[], bool]) -> None:
    """Start what becomes owed while `training()`; on this machine, until it is done after that."""
    local = run.settings().get("executor") == "local"
    known: list[Owed] = []
    asked, left, told = 0.0, False, ""
    while True:
        last = not training()
        ready = [] if _is_cancelled(run) else _ready(run)
        if ready and (last or local or ready != known or time.monotonic() - asked > ASK_SECONDS):
            known, asked = ready, time.monotonic()
            try:
                left = start(run, ready)
            except (UserError, OSError) as error:  # tried again: a limit on jobs may have been reached
                left = False
                if str(error) != told:
                    told = str(error)
                    say(f"an evaluation of {run.name} could not be started: {told}")
        if last and not (local and ready and left):
            return
        time.sleep(LOCAL_LOOK_SECONDS if local else LOOK_SECONDS)


def _ready(run: Run) -> list[Owed]:
    """The owed evaluations whose checkpoint has been written."""
    return [owed for owed in owed_by(run) if is_complete(owed.checkpoint)]


def _is_cancelled(run: Run) -> bool:
    newest = run.newest()
    return newest is not None and newest.job in run.cancelled_jobs()


def start(run: Run, ready: Sequence[Owed]) -> bool:
    """Start jobs for owed evaluations that are ready; whether any waits, runs or was started.

    One that failed or was cancelled is given up, so that its checkpoint is no longer kept. Raises UserError
    where SLURM refuses.
    """
    queue, local = Queue(), run.settings().get("executor") == "local"
    queued = False
    for owed in ready:
        state = state_of(owed.job, queue)
        if _is_over(owed, state):
            with suppress(FileNotFoundError):  # its results have just come
                owed.give_up()
                say(f"the evaluation of step {owed.step:,} is given up: {state}")
            continue
        if not state.queued and state.name != "UNKNOWN":
            job = _launch(owed)
            say(f"the evaluation of step {owed.step:,} is job {job}")
        queued = True
        if local:
            break
    return queued


def _is_over(owed: Owed, state: State) -> bool:
    """Whether no other job follows; one that was lost with its node is started again."""
    if state.queued or state.name in ("NEW", "UNKNOWN"):
        return False
    return state.name in ("FINISHED", "FAILED", "CANCELLED") or len(submissions(owed.job)) >= LAUNCHES


def _launch(owed: Owed) -> str:
    """Make the folder of the evaluation's job, unless it is there, and launch it; the job's id."""
    run, settings = owed.run, owed.run.settings()
    recipe = from_run(run.recipe(), settings)
    cluster = recipe.evaluate.cluster_of_job(recipe.cluster)
    if not owed.job.exists():
        own = {"cluster": cluster.model_dump(mode="json"), "on_event": None}
        Run.create(owed.job.path, run.recipe(), {**settings, **own})
    executor = settings["executor"]
    grace = parameters.grace_seconds(cluster, Slurm() if executor == "slurm" else None)
    code, trainee = run.path / str(settings["code"]), settings.get("evaluator", EVALUATOR)
    return launched(owed.job, cluster, code, executor, grace=grace, trainee=trainee, say=say)


def resume(run: Run, tell: Callable[[str], None], *, watched: bool) -> None:
    """When a run is submitted again: owe again what failed, and start what is owed.

    `watched`: the run's own job starts it, too.
    """
    for gone in owe_failed(run):
        tell(f"the evaluation of step {gone.step:,} cannot be repeated: its checkpoint is gone")
    ready, settings = _ready(run), run.settings()
    if not ready:
        return
    steps = ", ".join(f"{owed.step:,}" for owed in ready)
    tell(f"{counted(len(ready), 'evaluation')} left to jobs of their own, of step {steps}")
    try:
        if settings["executor"] == "slurm":
            start(run, ready)
        elif settings["executor"] == "local" and not watched:
            launch.detached(run.submitit, run.path / str(settings["code"]), __name__, str(run.path), "finish")
    except (UserError, OSError) as refusal:
        tell(f"not started: {refusal}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
