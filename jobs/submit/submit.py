"""What `clipcluster submit` does: check, find or make the run, fetch, launch. Submitting twice makes one run.

Submitting a recipe again finds its run: a running one is named, a finished one says so, any other resumes.
The launch is recorded before and after it happens, and no folder is removed that a job may be using.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clipcluster.check import plain
from clipcluster.data.storage.urls import redacted_within
from clipcluster.errors import UserError
from clipcluster.recipe.load import Loaded, recipe_keys, result_keys, settings_keys
from clipcluster.recipe.plan import usable_nodes
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.runs.folder import Run
from clipcluster.runs.names import as_typed, run_name, similar_runs
from clipcluster.text import counted
from jobs import submissions
from jobs.state import Queue, State, state_of
from jobs.submit import assets, evaluations, executor, launch, parameters, snapshot
from jobs.submit.recorded import launched
from jobs.train import TRAINEE
from tools.slurm import Slurm

LOCK = ".submit.lock"  # in the folder of runs
LOCK_SECONDS = 30.0
ENDING_SECONDS = 600.0  # how long a submission waits for a job that is still ending
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@dataclass(frozen=True)
class Wanted:
    """What the command line asked for."""

    recipe: Path
    overrides: Sequence[str] = ()
    runs: Path = Path("runs")
    site: str | None = None
    executor: str | None = None  # slurm | local | none (the folder alone); None: slurm where there is one
    follow: bool = False
    dry_run: bool = False
    quick: bool = False
    trainee: str = TRAINEE  # what a rank of the training runs
    evaluator: str = evaluations.TRAINEE  # … and one of an evaluation's own job
    say: Callable[[str], None] = field(default=print)


@dataclass(frozen=True)
class Submitted:
    """The run, and the job that runs it; None where nothing was submitted (dry run, finished)."""

    run: Run
    job: str | None


def submit(wanted: Wanted) -> Submitted:
    """Do what `clipcluster submit` does, but for following. Raises UserError, with nothing written."""
    chosen = executor.choose(wanted.executor, wanted.say)
    checked = checked_for(wanted, chosen)
    loaded, plan = checked.loaded, checked.plan
    assert plan is not None  # else there were errors
    run = Run(wanted.runs / run_name(loaded.recipe.name, result_keys(loaded)))
    state = _settled(run, wanted)
    if state.queued or state.name == "FINISHED":
        return _as_it_is(run, state, wanted)
    if state.name != "NEW":
        wanted.say(f"{run.name} was {state}: it resumes from its last checkpoint")
    if chosen != "none":
        launch.refuse_patterns(run.submitit)
    if not run.exists():
        _say_twins(loaded, wanted)
    if wanted.dry_run:
        _say_plan(run, checked, chosen, wanted)
        return Submitted(run, None)
    with tempfile.TemporaryDirectory(prefix="clipcluster-assets-") as aside:
        fetched = run.assets if run.exists() else Path(aside)  # copied into the new run
        for name in assets.fetch(loaded.recipe, fetched):
            wanted.say(f"fetched {name}")
        if not wanted.quick:
            from clipcluster.check import deep

            found = deep.check(loaded.recipe, world_size=plan.world_size, assets=fetched)
            found.raise_errors()
            _warn(found.warnings, wanted)
        with _only_submission(wanted):
            state = _settled(run, wanted)
            if state.queued or state.name == "FINISHED":  # somebody submitted it during the checks
                return _as_it_is(run, state, wanted)
            return Submitted(run, _start(run, checked, chosen, wanted, fetched))


def _settled(run: Run, wanted: Wanted) -> State:
    """The state of the run, once no job of it is ending and none may still appear.

    With --follow that is waited for. Raises UserError where it is not, and where nobody can know.
    """
    deadline = time.monotonic() + ENDING_SECONDS
    waiting = False
    while True:
        state = state_of(run, Queue())
        if state.name == "UNKNOWN":
            raise UserError(
                f"{run.name}: {state.detail}. Submit from a machine that reaches SLURM; or, knowing that the "
                f"job has ended: clipcluster cancel {as_typed(run)}"
            )
        if not state.queued or state.name in ("RUNNING", "PENDING"):
            return state
        ending = f"job {state.job} is still ending ({state.name})"
        what = ending if state.job else f"an earlier submission was interrupted ({state})"
        if not wanted.follow or wanted.dry_run or time.monotonic() > deadline:
            raise UserError(f"{run.name}: {what}. Submit again in a moment, or with --follow, which waits.")
        if not waiting:
            wanted.say(f"{run.name}: {what}; waiting for it")
            waiting = True
        time.sleep(1.0)


def _as_it_is(run: Run, state: State, wanted: Wanted) -> Submitted:
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
    wanted.say(f"{run.name} is {state}, as job {state.job}")
    return Submitted(run, state.job)


@contextlib.contextmanager
def _only_submission(wanted: Wanted) -> Iterator[None]:
    """One submission at a time in a folder of runs; who dies releases the lock. Raises UserError."""
    from filelock import FileLock, Timeout

    wanted.runs.mkdir(parents=True, exist_ok=True)
    lock = FileLock(wanted.runs / LOCK, timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another submission to {wanted.runs} has been under way for {LOCK_SECONDS:g} s; wait for it. "
            f"If there is none, remove {wanted.runs / LOCK}"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        wanted.say(f"{wanted.runs} is on a file system without locks: do not submit one recipe twice at once")
    try:
        yield
    finally:
        lock.release()


def checked_for(wanted: Wanted, chosen: str) -> plain.Checked:
    """The plain check, for one node where the run stays on this machine. Raises UserError."""
    overrides = list(wanted.overrides)
    checked = plain.check(wanted.recipe, overrides, site=wanted.site, runs=wanted.runs)
    nodes = checked.recipe.cluster.nodes
    if chosen == "local" and nodes.most > 1:
        wanted.say(f"this machine is one node: cluster.nodes=1 instead of {nodes}")
        overrides.append("cluster.nodes=1")
        checked = plain.check(wanted.recipe, overrides, site=wanted.site, runs=wanted.runs)
    checked.raise_errors()
    if chosen == "local" and (reason := executor.missing_devices(checked.recipe.cluster)):
        raise UserError(reason)
    if chosen == "local" and checked.recipe.cluster.setup:
        wanted.say("cluster.setup belongs to the cluster: its lines are left out on this machine")
    _warn(checked.warnings, wanted)
    return checked


def _warn(warnings: Sequence[str], wanted: Wanted) -> None:
    for warning in warnings:
        wanted.say(f"warning: {warning}")


def _say_twins(loaded: Loaded, wanted: Wanted) -> None:
    for run, differences in similar_runs(loaded.recipe.name, recipe_keys(loaded), wanted.runs)[:3]:
        for key, (here, there) in differences.items():
            wanted.say(
                f"a new run: {run.name} differs in {key} "
                f"({redacted_within(there)!r} there, {redacted_within(here)!r} here)"
            )


def _say_plan(run: Run, checked: plain.Checked, chosen: str, wanted: Wanted) -> None:
    """What a dry run says."""
    cluster, unchecked = checked.recipe.cluster, list(checked.unchecked)
    if not wanted.quick:
        unchecked.append("the towers and samples (clipcluster check --deep, and the submission)")
    for line in checked.summary:
        wanted.say(line)
    if unchecked:
        wanted.say(f"not checked: {'; '.join(unchecked)}")
    wanted.say(executor.devices(cluster, chosen))
    wanted.say(f"run: {run.path}" + ("" if run.exists() else " (new)"))
    if chosen == "none":
        wanted.say("would make the folder, and start nothing")
        return
    if chosen == "local":
        ranks = counted(cluster.ranks_per_node, "rank")
        wanted.say(f"would start {ranks} on this machine, for {cluster.time} at most")
        return
    flags = parameters.of_run(
        cluster, run, run.path / "code-N", grace=parameters.grace_seconds(cluster, Slurm())
    )
    wanted.say("would submit to SLURM:")
    additional = flags.pop("additional_parameters")
    for key, value in {**flags, **additional}.items():
        if not isinstance(value, list):
            wanted.say(f"  {key.replace('_', '-')}: {value}")


def _start(run: Run, checked: plain.Checked, chosen: str, wanted: Wanted, fetched: Path) -> str | None:
    """Make or update the folder, with the assets in `fetched`, and launch; returns the job's id.

    None where nothing was to be launched. A new folder does not outlive a refusal. Raises UserError.
    """
    plan, cluster, say = checked.plan, checked.recipe.cluster, wanted.say
    assert plan is not None
    grace = parameters.grace_seconds(cluster, Slurm() if chosen == "slurm" else None)
    keys = settings_keys(checked.loaded)
    settings = {
        **keys,
        # what the ranks have for a save, found here because only here SLURM is asked
        "cluster": {**keys["cluster"], "grace": f"{grace:g} s"},
        # for `status`; the attempts plan for themselves, with the nodes that they are given
        "plan": {"total_steps": plan.total_steps},
        "executor": chosen,
        "code": None,
        "evaluator": wanted.evaluator,
    }
    made = not run.exists()
    if made:
        Run.create(run.path, recipe_keys(checked.loaded), settings, assets=fetched)
    if chosen == "none":
        run.update_settings(settings)
        say(f"{run.name}: made, and nothing started. Train it with one of:")
        say(f"  clipcluster train {run.path}")
        say(f"  torchrun --nproc-per-node={plan.world_size} -m jobs.cli train {run.path}")
        return None
    try:
        code = snapshot.take(run.path)
        last = submissions.submissions(run)[-1:]
        if last and last[0].get("code") != code.name:
            say(f"the code differs from the last submission's: {code.name}")
        run.update_settings({**settings, "code": code.name})
    except BaseException:
        if made:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    job = _launch(run, checked.recipe, code, chosen, wanted, grace=grace, made=made)
    named = f"job {job}" if chosen == "slurm" else counted(cluster.ranks_per_node, "local rank")
    say(f"{run.name}: {counted(plan.total_steps, 'step')}, as {named}")
    say(executor.devices(cluster, chosen))
    if chosen == "local" and not launch.await_claim(run, job):
        say(
            f"{run.name}: its process has not claimed the run within {launch.START_SECONDS:g} s; "
            f"see {run.submitit / launch.LOCAL_LOG}"
        )
    evaluations.resume(run, say, watched=checked.recipe.evaluate.where == "job")
    return job


def _launch(
    run: Run, recipe: Recipe, code: Path, chosen: str, wanted: Wanted, *, grace: float, made: bool
) -> str:
    """The job's id. What SLURM refused leaves no folder behind; after any other failure the job may exist."""
    try:
        return launched(
            run,
            recipe.cluster,
            code,
            chosen,
            grace=grace,
            trainee=wanted.trainee,
            say=wanted.say,
            used=lambda granted: usable_nodes(recipe, granted),
            evaluations=recipe.evaluate.where == "job",
        )
    except launch.NoAnswer:
        raise
    except UserError:
        if made:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
