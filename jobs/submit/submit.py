"""What `clipcluster submit` does: check, find or make the run, fetch, launch. Submitting twice makes one run.

Submitting a recipe again finds its run: a running one is named, a finished one says so, any other resumes.
"""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clipcluster.check import deep
from clipcluster.check import plain as checks
from clipcluster.data.storage.urls import redacted_within
from clipcluster.errors import UserError
from clipcluster.recipe.load import Loaded, recipe_keys, result_keys
from clipcluster.recipe.plan import Plan
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.runs.folder import Run
from clipcluster.runs.names import run_name, similar_runs
from clipcluster.text import counted
from jobs.submit import assets, devices, executor
from jobs.submit import parameters as clusters
from jobs.submit.existing import running_or_finished
from jobs.submit.parameters import TRAINEE, Member
from jobs.submit.start import Start
from tools.slurm import Slurm

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
    found = running_or_finished(run, wanted.say, wait=wanted.follow, dry_run=wanted.dry_run)
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
            found = running_or_finished(run, said.append, wait=wanted.follow, dry_run=False)
            if found is not None:  # somebody submitted it during the checks
                wanted.say("\n".join(said))
                return Submitted(run, found.job if not found.ended else None, chosen)
            job = Start(run, loaded, plan, chosen, wanted.trainee, wanted.say).start(fetched)
            return Submitted(run, job, chosen)


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


def checked_for(wanted: Wanted, executor: str) -> checks.Checked:
    """The plain check, for one node where the run stays on this machine. Raises UserError."""

    def plain(*more: str) -> checks.Checked:
        return checks.check(wanted.recipe, [*wanted.overrides, *more], site=wanted.site, runs=wanted.runs)

    checked = plain()
    nodes = checked.recipe.cluster.nodes
    if executor == "local" and nodes.most > 1:
        wanted.say(f"this machine is one node: cluster.nodes=1 instead of {nodes}")
        checked = plain("cluster.nodes=1")
    checked.raise_errors()
    if executor == "local" and (reason := devices.missing(checked.recipe.cluster)):
        raise UserError(reason)
    if executor == "local" and checked.recipe.cluster.setup:
        wanted.say("cluster.setup belongs to the cluster: its lines are left out on this machine")
    for warning in checked.warnings:
        wanted.say(f"warning: {warning}")
    return checked


def _say_twins(loaded: Loaded, wanted: Wanted) -> None:
    for run, differences in similar_runs(loaded.recipe.name, recipe_keys(loaded), wanted.runs)[:3]:
        for key, (here, there) in differences.items():
            wanted.say(
                f"a new run: {run.name} differs in {key} "
                f"({redacted_within(there)!r} there, {redacted_within(here)!r} here)"
            )


def _say_plan(run: Run, checked: checks.Checked, executor: str, wanted: Wanted) -> None:
    later = [] if wanted.quick else ["the towers and samples (clipcluster check --deep, and the submission)"]
    unchecked = (
        [f"not checked: {'; '.join([*checked.unchecked, *later])}"] if checked.unchecked or later else []
    )
    for line in [*checked.summary, *unchecked, devices.describe(checked.recipe.cluster, executor)]:
        wanted.say(line)
    wanted.say(f"run: {run.path}" + ("" if run.exists() else " (new)"))
    cluster = checked.recipe.cluster
    if executor == "none":
        wanted.say("would make the folder, and start nothing")
        return
    if executor == "local":
        ranks = counted(cluster.ranks_per_node, "rank")
        wanted.say(f"would start {ranks} on this machine, for {cluster.time} at most")
        return
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
    """The folder of the run's assets: its own, or for a new run one aside that is copied into it."""
    with tempfile.TemporaryDirectory(prefix="clipcluster-assets-") as aside:
        folder = run.assets if run.exists() else Path(aside)
        for name in assets.fetch(recipe, folder):
            wanted.say(f"fetched {name}")
        yield folder


def _deep(recipe: Recipe, plan: Plan, fetched: Path, wanted: Wanted) -> None:
    findings = deep.check(recipe, world_size=plan.world_size, assets=fetched)
    findings.raise_errors()
    for warning in findings.warnings:
        wanted.say(f"warning: {warning}")
