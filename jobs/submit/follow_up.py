"""Jobs for what follows a run once it has finished: exports and evaluations.

Such a job has a run folder of its own below the run, `RUN/then/NAME`: it is claimed, judged, requeued and
cancelled as any job. On SLURM it depends on the run's job; on this machine a process waits for the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.recipe.load import from_run
from clipcluster.recipe.sections.chain import Export, Measure
from clipcluster.runs.folder import Run
from jobs.state import Queue, state_of
from jobs.submit import containers, waiting
from jobs.submit.prepared import Prepared, grace_of
from jobs.submit.recorded import launched
from jobs.submit.submit import only_submission, settled
from jobs.submit.wanted import Wanted

FOLDER = "then"
TRAINEE = "jobs.steps:perform"


def order_of(step: Export | Measure, member: str = "") -> dict[str, Any]:
    """What is asked of the job, as its settings hold it; of a sweep's `member` in a place of its own."""
    out = Path(step.out)
    if isinstance(step, Export):
        return {"do": "export", "format": step.export, "out": str(out / member), "weights": step.weights}
    out = out.with_suffix("") / f"{member}{out.suffix}" if member else out
    return {"do": "evaluate", "overrides": list(step.evaluate), "out": str(out), "weights": step.weights}


def step_of(run: Run, order: Mapping[str, Any]) -> Run:
    """The run folder of the job that does this with the run."""
    digits = hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()[:8]
    return Run(run.path / FOLDER / f"{run.name}-{order['do']}-{digits}")


def submit_step(run: Run, order: Mapping[str, Any], say: Callable[[str], None]) -> tuple[Run, str | None]:
    """Queue the job, unless it is queued or has done its work; returns its run folder and the job.

    Raises UserError for a run that has not finished and is not queued, and where SLURM refuses.
    """
    with only_submission(run.path.parent, say):
        return _submit_step(run, order, say)


def _submit_step(run: Run, order: Mapping[str, Any], say: Callable[[str], None]) -> tuple[Run, str | None]:
    step, queue = step_of(run, order), Queue()
    training, state = state_of(run, queue), settled(step, Wanted(step.path, say=say), queue)
    if state.queued or state.name == "FINISHED":
        say(f"{step.name} is {state}")
        return step, state.job if state.queued else None
    executor = "slurm" if run.settings()["executor"] == "slurm" else "local"
    waits = training.queued and bool(training.job or executor == "local")
    if training.name != "FINISHED" and not waits:
        raise UserError(f"{run.name} is {training}: submit it first, then what follows it")
    prepared = _prepared(run, step, order, executor)
    if executor == "local" and training.queued:
        waiting.hand_over([prepared], step.submitit, parallel=1, trainee=TRAINEE)
        say(f"{step.name}: starts on this machine once {run.name} has finished")
        return step, None
    after = training.job if training.queued else None
    job = launched(
        step,
        prepared.recipe.cluster,
        prepared.code,
        executor,
        grace=prepared.grace,
        trainee=TRAINEE,
        say=say,
        dependency=f"afterok:{after}" if after else "",
    )
    say(f"{step.name}: as job {job}" + (f" (afterok:{after})" if after else ""))
    return step, job


def _prepared(run: Run, step: Run, order: Mapping[str, Any], executor: str) -> Prepared:
    """The job's run folder, made or brought up to date: one node of the training's, and its code."""
    settings = run.settings()
    recipe = from_run(run.recipe(), settings)
    cluster = recipe.evaluate.cluster_of_job(recipe.cluster)
    if order["do"] == "export":  # which computes on the CPU
        cluster = cluster.model_copy(update={"gpus_per_node": 0, "tasks_per_node": 1})
    cluster = containers.writing_to(cluster, Path(order["out"]).parent)
    own = {
        **settings,
        "cluster": cluster.model_dump(mode="json"),
        "plan": {"total_steps": None},
        "step": dict(order),
        "after": [str(run.path)],
        "code": f"../../{settings['code']}",  # from the folder of the step
    }
    made = not step.exists()
    if made:
        Run.create(step.path, run.recipe(), own)
    else:
        step.update_settings(own)
    recipe = recipe.model_copy(update={"cluster": cluster})
    return Prepared(step, recipe, run.path / str(settings["code"]), grace_of(recipe, executor), made)


def say_step(run: Run, order: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """What a dry run says."""
    what = f"export as {order['format']}" if order["do"] == "export" else "evaluation"
    say(f"then: {what} of {run.name} to {order['out']}, once it has finished")
