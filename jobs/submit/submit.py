"""What `clipcluster submit` does: check, find or make the run, fetch, launch. Submitting twice makes one run.

Submitting a recipe again finds its run: a running one is named, a finished one says so, any other resumes.
The launch is recorded before and after it happens, and no folder is removed that a job may be using.
"""

from __future__ import annotations

import contextlib
import errno
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcluster.check import plain
from clipcluster.data.storage.urls import redacted_within
from clipcluster.errors import UserError
from clipcluster.recipe.load import Loaded, recipe_keys
from clipcluster.recipe.sweep import Member
from clipcluster.runs.folder import Run
from clipcluster.runs.names import as_typed, similar_runs
from clipcluster.text import counted
from jobs import submissions
from jobs.state import Queue, State, state_of
from jobs.submit import assets, checking, evaluations, executor, launch, parameters, waiting
from jobs.submit.prepared import Prepared, folder_alone, grace_of, prepare
from jobs.submit.recorded import launched
from jobs.submit.wanted import Wanted

LOCK = ".submit.lock"  # in the folder of runs
LOCK_SECONDS = 30.0
ENDING_SECONDS = 600.0  # how long a submission waits for a job that is still ending
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@dataclass(frozen=True)
class Submitted:
    """The run, and the job that runs it; None where nothing was submitted (dry run, finished)."""

    run: Run
    job: str | None


def submit(wanted: Wanted) -> Submitted:
    """Do what `clipcluster submit` does, but for following. Raises UserError, with nothing written."""
    chosen = executor.choose(wanted.executor, wanted.say)
    refuse_unqueued(wanted, chosen)
    checked = checked_for(wanted, chosen)
    loaded = checked.loaded
    run = checking.run_of(checked, wanted.runs)
    state = settled(run, wanted)
    if state.queued or state.name == "FINISHED":
        return as_it_is(run, state, wanted)
    if state.name != "NEW":
        wanted.say(f"{run.name} was {state}: it resumes from its last checkpoint")
    if chosen != "none":
        launch.refuse_patterns(run.submitit)
    if not run.exists():
        _say_twins(loaded, wanted)
    if wanted.dry_run:
        checking.complete(checked, run, chosen, quick=True)
        _say_findings(checked, wanted)
        _say_plan(run, checked, chosen, wanted)
        return Submitted(run, None)
    with tempfile.TemporaryDirectory(prefix="clipcluster-assets-") as aside:
        fetched = run.assets if run.exists() else Path(aside)  # copied into the new run
        for name in assets.fetch(loaded.recipe, fetched):
            wanted.say(f"fetched {name}")
        checking.complete(
            checked,
            run,
            chosen,
            assets=fetched,
            quick=wanted.quick,
            refused_ends=True,
            say=wanted.say,
        )
        _say_findings(checked, wanted)
        with only_submission(wanted.runs, wanted.say):
            state = settled(run, wanted)
            if state.queued or state.name == "FINISHED":  # somebody submitted it during the checks
                return as_it_is(run, state, wanted)
            return Submitted(run, _start(run, checked, chosen, wanted, fetched))


def refuse_unqueued(wanted: Wanted, chosen: str) -> None:
    """UserError where the run would start before what comes first is made: nothing queued makes it."""
    for one in () if wanted.dry_run else wanted.after:
        if not (one.jobs if chosen == "slurm" else one.runs):
            raise UserError(
                f"{one.path} is not made yet, and nothing is queued that makes it; start that first"
            )


def settled(run: Run, wanted: Wanted, queue: Queue | None = None) -> State:
    """The state of the run, once no job of it is ending and none may still appear.

    With --follow that is waited for; a dry run then takes it as it is. Raises UserError where it is not
    waited for, and where nobody can know. `queue`: as SLURM was asked a moment ago.
    """
    deadline = time.monotonic() + ENDING_SECONDS
    waiting = False
    while True:
        state, queue = state_of(run, queue or Queue()), None
        if state.name == "UNKNOWN":
            raise UserError(
                f"{run.name}: {state.detail}. Submit from a machine that reaches SLURM; or, knowing that the "
                f"job has ended: clipcluster cancel {as_typed(run)}"
            )
        if not state.queued or state.name in ("RUNNING", "PENDING") or (wanted.dry_run and wanted.follow):
            return state
        ending = f"job {state.job} is still ending ({state.name})"
        what = ending if state.job else f"an earlier submission was interrupted ({state})"
        if not wanted.follow or time.monotonic() > deadline:
            raise UserError(f"{run.name}: {what}. Submit again in a moment, or with --follow, which waits.")
        if not waiting:
            wanted.say(f"{run.name}: {what}; waiting for it")
            waiting = True
        time.sleep(1.0)


def as_it_is(run: Run, state: State, wanted: Wanted) -> Submitted:
    """A run that needs no submission, but perhaps its evaluations. A dry run records nothing.

    A job whose submitter died is recorded.
    """
    if not wanted.dry_run:
        evaluations.resume(run, wanted.say, watched=state.queued)
    if not state.queued:
        wanted.say(f"{run.name} is finished; see: clipcluster status {as_typed(run)}")
        return Submitted(run, None)
    if state.job and not wanted.dry_run:
        submissions.adopt(run, state.job)
    wanted.say(f"{run.name} is {state}" + (f", as job {state.job}" if state.job else ""))
    return Submitted(run, state.job)


@contextlib.contextmanager
def only_submission(runs: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One submission at a time in a folder of runs; who dies releases the lock. Raises UserError."""
    from filelock import FileLock, Timeout

    runs.mkdir(parents=True, exist_ok=True)
    lock = FileLock(runs / LOCK, timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another submission to {runs} has been under way for {LOCK_SECONDS:g} s; wait for it. "
            f"If there is none, remove {runs / LOCK}"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        say(f"{runs} is on a file system without locks: do not submit one recipe twice at once")
    try:
        yield
    finally:
        lock.release()


def checked_for(wanted: Wanted, chosen: str, member: Member | None = None) -> plain.Checked:
    """The plain check, for one node where the run stays on this machine. Raises UserError."""
    overrides = list(wanted.overrides)
    given: dict[str, Any] = {"site": wanted.site, "runs": wanted.runs, "member": member}
    given["awaited"] = [one.path.absolute() for one in wanted.after]
    checked = plain.check(wanted.recipe, overrides, **given)
    nodes = checked.recipe.cluster.nodes
    if chosen == "local" and nodes.most > 1:
        wanted.say(f"this machine is one node: cluster.nodes=1 instead of {nodes}")
        overrides.append("cluster.nodes=1")
        checked = plain.check(wanted.recipe, overrides, **given)
    checked.raise_errors()
    if chosen == "local" and (reason := executor.missing_devices(checked.recipe.cluster)):
        raise UserError(reason)
    for key in ("setup", "container"):
        if chosen == "local" and getattr(checked.recipe.cluster, key):
            wanted.say(f"cluster.{key} belongs to the cluster: it is left out on this machine")
    return checked


def _say_findings(checked: plain.Checked, wanted: Wanted) -> None:
    """Raise the errors, or say everything else."""
    checked.raise_errors()
    for line in checking.table(checked):
        wanted.say(line)


def _say_twins(loaded: Loaded, wanted: Wanted) -> None:
    for run, differences in similar_runs(loaded.recipe.name, recipe_keys(loaded), wanted.runs)[:3]:
        for key, (here, there) in differences.items():
            wanted.say(
                f"a new run: {run.name} differs in {key} "
                f"({redacted_within(there)!r} there, {redacted_within(here)!r} here)"
            )


def _say_plan(run: Run, checked: plain.Checked, chosen: str, wanted: Wanted) -> None:
    """What a dry run says, after the findings."""
    cluster = checked.recipe.cluster
    wanted.say(f"run: {run.path}" + ("" if run.exists() else " (new)"))
    if chosen == "none":
        wanted.say("would make the folder, and start nothing")
        return
    if chosen == "local":
        ranks = counted(cluster.ranks_per_node, "rank")
        wanted.say(f"would start {ranks} on this machine, for {cluster.time} at most")
        return
    grace = grace_of(checked.recipe, "slurm")
    flags = parameters.of_run(cluster, run, run.path / "code-N", grace=grace, dependency=wanted.dependency)
    wanted.say("would submit to SLURM:")
    say_flags(flags, wanted)
    if cluster.container is not None:
        wanted.say(f"  container: {cluster.container.image} ({cluster.container.runtime})")


def say_flags(flags: dict[str, Any], wanted: Wanted) -> None:
    """The flags of a job that would be submitted, a line each, without what its script does."""
    additional = flags.pop("additional_parameters")
    for key, value in {**flags, **additional}.items():
        if not isinstance(value, list):
            wanted.say(f"  {key.replace('_', '-')}: {value}")


def _start(run: Run, checked: plain.Checked, chosen: str, wanted: Wanted, fetched: Path) -> str | None:
    """Make or update the folder, with the assets in `fetched`, and launch; returns the job's id.

    None where nothing was to be launched. A new folder does not outlive a refusal. Raises UserError.
    """
    cluster, say = checked.recipe.cluster, wanted.say
    if chosen == "none":
        folder_alone(run, checked, wanted, fetched)
        return None
    grace = grace_of(checked.recipe, chosen)
    prepared = prepare(run, checked, chosen, wanted, fetched, grace=grace)
    if chosen == "local" and wanted.after:
        waiting.hand_over([prepared], run.submitit, parallel=1, trainee=wanted.trainee)
        say(f"{run.name}: starts on this machine once what comes first has finished")
        return None
    job = start(prepared, chosen, wanted, wanted.dependency)
    named = f"job {job}" if chosen == "slurm" else counted(cluster.ranks_per_node, "local rank")
    steps = counted(checked.plan.total_steps, "step") if checked.plan else "steps not known yet"
    say(f"{run.name}: {steps}, as {named}" + (f" ({wanted.dependency})" if wanted.dependency else ""))
    if chosen == "local" and not launch.await_claim(run, job):
        say(
            f"{run.name}: its process has not claimed the run within {launch.START_SECONDS:g} s; "
            f"see {run.submitit / launch.LOCAL_LOG}"
        )
    evaluations.resume(run, say, watched=checked.recipe.evaluate.where == "job")
    return job


def start(prepared: Prepared, chosen: str, wanted: Wanted, dependency: str) -> str:
    """The job's id. What SLURM refused leaves no folder behind; after any other failure the job may exist."""
    try:
        return launched(
            prepared.run,
            prepared.recipe.cluster,
            prepared.code,
            chosen,
            grace=prepared.grace,
            trainee=wanted.trainee,
            say=wanted.say,
            used=prepared.used,
            evaluations=prepared.recipe.evaluate.where == "job",
            dependency=dependency,
        )
    except launch.NoAnswer:
        raise
    except UserError:
        prepared.undo()
        raise
