"""A recipe becomes a run, and the run a job: check, folder, assets, snapshot, launch. Twice is once.

Submitting a recipe again finds its run: a running one is named, a finished one says so, any other resumes.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clipcluster.check import deep
from clipcluster.check import plain as checks
from clipcluster.errors import UserError
from clipcluster.recipe.load import Loaded, recipe_keys, result_keys, settings_keys
from clipcluster.recipe.plan import Plan, usable_nodes
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.runs.folder import Run, near_twins, run_name
from jobs import submissions
from jobs.status import Queue, State, state_of
from jobs.submit import assets, devices, executor, launch, snapshot
from jobs.submit import parameters as clusters
from jobs.submit.parameters import TRAINEE, Member
from tools.slurm import Slurm

ENDING_SECONDS = 600.0  # how long --follow waits for a job that is still ending
LOCK = ".submit.lock"  # in the folder of runs
LOCK_SECONDS = 30.0
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
    trainee: str = TRAINEE
    environ: Mapping[str, str] | None = None
    say: Callable[[str], None] = field(default=print)


@dataclass(frozen=True)
class Submitted:
    """The run, and the job that runs it; None where nothing was submitted (dry run, finished)."""

    run: Run
    job: str | None
    executor: str


def submit(wanted: Wanted) -> Submitted:
    """Do what `clipcluster submit` does, but for following. Raises UserError, with nothing written."""
    chosen = executor.choose(wanted.executor, wanted.say)
    checked = checked_for(wanted, chosen)
    loaded, plan = checked.loaded, checked.plan
    assert loaded is not None
    assert plan is not None  # else there were errors
    run = Run(wanted.runs / run_name(loaded.recipe.name, result_keys(loaded)))
    found = _found(run, wanted)
    if found is not None:
        return Submitted(run, found.job if not found.ended else None, chosen)
    if not run.exists():
        _say_twins(loaded, wanted)
    if wanted.dry_run:
        _say_plan(run, checked, chosen, wanted)
        return Submitted(run, None, chosen)
    with _fetched(loaded.recipe, run, wanted) as fetched:
        if not wanted.quick:
            _deep(loaded.recipe, plan, fetched, wanted)
        with _only_submission(wanted):
            said: list[str] = []
            found = _found(run, replace(wanted, say=said.append))
            if found is not None:  # somebody submitted it during the checks
                wanted.say("\n".join(said))
                return Submitted(run, found.job if not found.ended else None, chosen)
            return _start(run, loaded, plan, chosen, fetched, wanted)


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
        wanted.say(f"{wanted.runs} is on a file system without locks: submit a recipe once at a time")
    try:
        yield
    finally:
        lock.release()


def checked_for(wanted: Wanted, executor: str) -> checks.Checked:
    """The plain check, for one node where the run stays on this machine. Raises UserError."""

    def plain(*more: str) -> checks.Checked:
        return checks.check(
            wanted.recipe, [*wanted.overrides, *more], wanted.environ, site=wanted.site, runs=wanted.runs
        )

    checked = plain()
    nodes = checked.recipe.cluster.nodes
    if executor == "local" and nodes.most > 1:
        wanted.say(f"this machine is one node: cluster.nodes=1 instead of {nodes}")
        checked = plain("cluster.nodes=1")
    checked.raise_errors()
    if executor == "local":
        devices.require(checked.recipe.cluster)
    if executor == "local" and checked.recipe.cluster.setup:
        wanted.say("cluster.setup belongs to the cluster: its lines are left out on this machine")
    for warning in checked.warnings:
        wanted.say(f"warning: {warning}")
    return checked


def _found(run: Run, wanted: Wanted) -> State | None:
    """The state of a run that needs no submission; None where one is due. Waits for an ending job to go."""
    deadline = time.monotonic() + ENDING_SECONDS
    waiting = False
    while run.exists():
        state = state_of(run, Queue())
        if not state.queued:
            return _settled(run, state, wanted)
        if state.name in ("RUNNING", "PENDING"):
            if not wanted.dry_run:
                _adopt(run, state)
            wanted.say(f"{run.name} is {state}, as job {state.job}")
            return state
        what = f"job {state.job} is still ending" if state.job else "an earlier submission was interrupted"
        if not wanted.follow or wanted.dry_run or time.monotonic() > deadline:
            raise UserError(
                f"{run.name}: {what} ({state}). Submit again in a moment, or with --follow, which waits."
            )
        if not waiting:
            wanted.say(f"{run.name}: {what}; waiting for it ({state})")
            waiting = True
        time.sleep(1.0)
    return None


def _adopt(run: Run, state: State) -> None:
    """Record the job of a launch whose process died before it did."""
    intent = submissions.unanswered(run)
    if intent is not None and state.job is not None and state.job not in submissions.job_ids(run):
        submissions.launched(run, intent, state.job)


def _settled(run: Run, state: State, wanted: Wanted) -> State | None:
    if state.name == "FINISHED":
        wanted.say(f"{run.name} is finished; see: clipcluster status {run.name}")
        return state
    if state.name == "UNKNOWN":
        raise UserError(
            f"{run.name}: {state.detail}. Submit from a machine that reaches SLURM; or, knowing that the job "
            f"has ended: clipcluster cancel {run.name}"
        )
    if state.name != "NEW":
        wanted.say(f"{run.name} was {state}: it resumes from its last checkpoint")
    return None


def _say_twins(loaded: Loaded, wanted: Wanted) -> None:
    for twin in near_twins(loaded.recipe.name, recipe_keys(loaded), wanted.runs)[:3]:
        for difference in twin.differences:
            wanted.say(
                f"a new run: {twin.run.name} differs in {difference.key} "
                f"({difference.there!r} there, {difference.here!r} here)"
            )


def _say_plan(run: Run, checked: checks.Checked, executor: str, wanted: Wanted) -> None:
    for line in [*checked.summary, devices.describe(checked.recipe.cluster, executor)]:
        wanted.say(line)
    wanted.say(f"run: {run.path}" + ("" if run.exists() else " (new)"))
    if executor == "none":
        wanted.say("would make the folder, and start nothing")
        return
    if executor == "local":
        cluster = checked.recipe.cluster
        ranks = f"{cluster.ranks_per_node} rank{'s' * (cluster.ranks_per_node > 1)}"
        wanted.say(f"would start {ranks} on this machine, for {cluster.time} at most")
        return
    cluster = checked.recipe.cluster
    chosen = clusters.parameters(
        cluster,
        [Member(run.path, run.path / "code-N")],
        name=run.name,
        logs=run.submitit,
        grace=clusters.grace_seconds(cluster, Slurm()),
    )
    wanted.say("would submit to SLURM:")
    additional = chosen.pop("additional_parameters")
    for key, value in {**chosen, **additional}.items():
        if not isinstance(value, list):
            wanted.say(f"  {key.replace('_', '-')}: {value}")


@contextlib.contextmanager
def _fetched(recipe: Recipe, run: Run, wanted: Wanted) -> Iterator[Path]:
    """The folder of the run's assets: its own, or for a new run one aside that `_start` moves into it."""
    if run.exists():
        for name in assets.fetch(recipe, run.assets):
            wanted.say(f"fetched {name}")
        yield run.assets
        return
    with tempfile.TemporaryDirectory(prefix="clipcluster-assets-") as aside:
        for name in assets.fetch(recipe, Path(aside)):
            wanted.say(f"fetched {name}")
        yield Path(aside)


def _deep(recipe: Recipe, plan: Plan, fetched: Path, wanted: Wanted) -> None:
    findings = deep.check(recipe, world_size=plan.world_size, assets=fetched)
    findings.raise_errors()
    for warning in findings.warnings:
        wanted.say(f"warning: {warning}")


def _start(run: Run, loaded: Loaded, plan: Plan, where: str, fetched: Path, wanted: Wanted) -> Submitted:
    """Make or update the folder, take the snapshot, launch. A new folder does not outlive a refusal."""
    made = not run.exists()
    cluster = loaded.recipe.cluster
    grace = clusters.grace_seconds(cluster, Slurm() if where == "slurm" else None)
    if made:
        Run.create(run.path, recipe_keys(loaded), settings(loaded, plan, where, None, grace=grace))
        shutil.copytree(fetched, run.assets, dirs_exist_ok=True)
    if where == "none":
        run.update_settings(settings(loaded, plan, where, None, grace=grace))
        wanted.say(f"{run.name}: made, and nothing started. Train it with one of:")
        wanted.say(f"  clipcluster train {run.path}")
        wanted.say(f"  torchrun --nproc-per-node={plan.world_size} -m jobs.cli train {run.path}")
        return Submitted(run, None, where)
    try:
        code = snapshot.take(run)
        if code.new and not code.first:
            wanted.say(f"the code differs from the last submission's: {code.path.name}")
        run.update_settings(settings(loaded, plan, where, code.path.name, grace=grace))
    except BaseException:
        if made:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    job = _launch(run, loaded.recipe, code.path, where, grace, wanted, made=made)
    ranks = cluster.ranks_per_node
    named = f"job {job}" if where == "slurm" else f"{ranks} local rank{'s' * (ranks > 1)}"
    wanted.say(f"{run.name}: {plan.total_steps:,} steps, as {named}")
    wanted.say(devices.describe(cluster, where))
    if where == "local" and not launch.await_claim(run, job):
        wanted.say(
            f"{run.name}: its process runs but has not claimed the run within {launch.START_SECONDS:g} s; "
            f"see {launch.local_log(run)}"
        )
    return Submitted(run, job, where)


def _launch(
    run: Run, recipe: Recipe, code: Path, where: str, grace: float, wanted: Wanted, *, made: bool
) -> str:
    """The job's id. The intent is recorded before, the job or the refusal after it.

    Only what SLURM refused leaves no folder behind: after any other failure the job may exist.
    """
    intent = submissions.intend(run, where, code.name)
    try:
        job = _launch_on(where, run, recipe, code, grace, wanted.trainee)
    except BaseException as failure:
        if isinstance(failure, UserError) and not isinstance(failure, launch.NoAnswer):
            submissions.refused(run, intent, str(failure))
            if made:
                shutil.rmtree(run.path, ignore_errors=True)
            raise
        found = Queue().jobs_of(run) if where == "slurm" else []
        if not found:
            if isinstance(failure, launch.NoAnswer):
                raise UserError(
                    f"{run.name}: {failure}. Whether the job was accepted is not known: submit the run again "
                    "in a minute, which finds the job or queues a new one."
                ) from None
            raise
        job = found[-1]
        submissions.launched(run, intent, job)
        if not isinstance(failure, launch.NoAnswer):
            wanted.say(f"{run.name} is queued, as job {job}; to end it: clipcluster cancel {run.name}")
            raise
        return job
    submissions.launched(run, intent, job)
    return job


def _launch_on(where: str, run: Run, recipe: Recipe, code: Path, grace: float, trainee: str) -> str:
    member = Member(run.path, code)
    if where == "local":
        return launch.locally(recipe.cluster, member, grace=grace, trainee=trainee)
    return launch.on_slurm(
        recipe.cluster,
        [member],
        name=run.name,
        logs=run.submitit,
        grace=grace,
        trainee=trainee,
        used=lambda granted: usable_nodes(recipe, granted),
    )[0]


def settings(loaded: Loaded, plan: Plan, executor: str, code: str | None, *, grace: float) -> dict[str, Any]:
    """What settings.yaml holds: the recipe's speed and record keys, paths, the plan, executor and code.

    `grace` (seconds) is what the ranks have for a save, found here because only here SLURM is asked.
    """
    keys = settings_keys(loaded)
    return {
        **keys,
        "cluster": {**keys["cluster"], "grace": f"{grace:g} s"},
        "plan": {"total_steps": plan.total_steps},  # for status; a rank computes its own
        "executor": executor,
        "code": code,
    }
