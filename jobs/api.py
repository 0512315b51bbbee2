"""Submitting from Python: `from clipcluster import submit`. The command is built on it: both do the same."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from clipcluster.errors import UserError
from clipcluster.recipe.load import load_chain, load_sweep
from clipcluster.recipe.sections.chain import Before, Chain, Convert, Export, Measure
from clipcluster.runs.chains import find_chain, record
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics
from clipcluster.runs.names import runs_folder
from clipcluster.runs.sweeps import find_runs, find_sweep
from jobs.cancel import cancel_all, end_each
from jobs.conversions import Conversion
from jobs.conversions import start as start_conversion
from jobs.state import ASK_SECONDS, Queue, State, state_of
from jobs.submit import executor as executors
from jobs.submit.follow_up import order_of, say_step, submit_step
from jobs.submit.submit import submit as submit_run
from jobs.submit.sweep import submit_sweep
from jobs.submit.wanted import Awaited, Wanted

LOOK_SECONDS = 0.5
# Of several runs that have ended, the first of these that one is in says how they ended together.
WORST = ("FAILED", "LOST", "TIMEOUT", "CANCELLED", "STOPPED", "NEW", "FINISHED")


class Submission:
    """A run, or the runs of a sweep.

    Attributes:
        name: of the run, or of the sweep.
        runs: its run folders; one unless it is a sweep.
        jobs: of what is queued after this call: name of a run -> job id. Runs that wait for their turn on
            this machine have none yet.
        first: what it starts after, where the recipe or the call names that.
        then: what follows it, where the recipe names that.
    """

    def __init__(self, name: str, runs: Sequence[Run], jobs: Mapping[str, str] | None = None) -> None:
        self.name, self.runs, self.jobs = name, list(runs), dict(jobs or {})
        self.first: list[Submission | Conversion] = []
        self.then: list[Submission] = []
        self._queue, self._asked = Queue(), time.monotonic()

    def __repr__(self) -> str:
        return f"Submission({self.name!r}, {self.state})"

    @property
    def members(self) -> list[Submission]:
        """Each run for itself."""
        return [Submission(run.name, [run]) for run in self.runs]

    @property
    def path(self) -> Path:
        """The folder of the run, or of a sweep's first."""
        return self.runs[0].path

    @property
    def state(self) -> str:
        """RUNNING, PENDING, …, FINISHED, FAILED: as `clipcluster status` has it; of several runs one word.

        While one runs they are RUNNING, while one is queued PENDING; ended, they are as the worst of them.
        """
        return _together(self.states(fresh=True))

    def states(self, *, fresh: bool = False) -> list[State]:
        """The state of each run; SLURM is asked at most every ten seconds, unless it is to be fresh."""
        if fresh or time.monotonic() - self._asked > ASK_SECONDS:
            self._queue, self._asked = Queue(), time.monotonic()
        return [state_of(run, self._queue) for run in self.runs]

    def wait(self, timeout: float | None = None, say: Callable[[str], None] = lambda line: None) -> str:
        """Wait until every run has ended, and what follows it; returns the state of the runs.

        `say` is told of every change. Raises TimeoutError after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        known: dict[str, str] = {}
        while True:
            states = self.states()
            for run, state in zip(self.runs, states, strict=True):
                if known.get(run.name) != str(state):
                    known[run.name] = str(state)
                    say(f"{run.name}: {state}")
            if all(state.ended and not state.queued for state in states):
                break
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} is {_together(states)} after {timeout:g} s")
            time.sleep(LOOK_SECONDS)
        for step in self.then:
            step.wait(None if deadline is None else max(0.0, deadline - time.monotonic()), say)
        return _together(states)

    def metrics(self) -> list[dict[str, Any]]:
        """One mapping a step, as `clipcluster metrics --jsonl` has them; of a sweep each names its `run`."""
        if len(self.runs) == 1:
            return merged_metrics(self.runs[0])
        return [{"run": run.name, **line} for run in self.runs for line in merged_metrics(run)]

    def best(self, metric: str) -> Submission:
        """The member whose last value of a metric is the best. UserError where none has one."""
        from jobs.compare import ranked

        return Submission(*_named(ranked(self.runs, metric)[0].run))

    def cancel(self) -> list[str]:
        """End for good what follows, the runs and what came first; submitting again resumes them.

        Returns what was done, a line each. Raises UserError, as the command, once all others are ended.
        """
        own = partial(cancel_all, self.runs, Queue())
        return end_each([*(step.cancel for step in self.then), own, *(link.cancel for link in self.first)])


def _named(run: Run) -> tuple[str, list[Run]]:
    return run.name, [run]


def _together(states: Sequence[State]) -> str:
    names = {state.name for state in states}
    if len(names) == 1:
        return names.pop()
    for name in ("UNKNOWN", "RUNNING", "COMPLETING", "PENDING", "SUBMITTING"):
        if name in names:
            return name
    return next(name for name in WORST if name in names)


def submit(
    recipe: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    runs: str | Path | None = None,
    site: str | None = None,
    executor: str | None = None,
    follow: bool = False,
    dry_run: bool = False,
    quick: bool = False,
    after: Sequence[Submission | Conversion] = (),
    say: Callable[[str], None] = print,
    **more: Any,
) -> Submission:
    """Start what a recipe describes, a run or a sweep, or resume it: the same recipe finds its runs again.

    Args:
        recipe: the YAML file.
        overrides: keys that differ, by dotted path, or texts ``key=value``.
        runs: the folder of runs; default $CLIPCLUSTER_RUNS, else ./runs.
        site, executor, follow, dry_run, quick: as the options of `clipcluster submit`; `follow` only waits
            for jobs that are still ending.
        after: what must finish before it starts; keys may name the folders that it makes.
        say: takes what the command prints, warnings among it.
        more: other fields of `jobs.submit.wanted.Wanted`.

    Raises:
        UserError: what the command would print, with nothing started.
    """
    wanted = Wanted(
        recipe=Path(recipe),
        overrides=_texts(overrides) if isinstance(overrides, Mapping) else list(overrides),
        runs=runs_folder(Path(runs) if runs is not None else None),
        site=site,
        executor=executor,
        follow=follow,
        dry_run=dry_run,
        quick=quick,
        say=say,
        **more,
    )
    chain = load_chain(wanted.recipe, wanted.overrides, site=site)
    if chain.first and not dry_run:  # so that nothing starts where a later part of the chain is wrong
        _submit_chain(chain, replace(wanted, dry_run=True, say=lambda line: None), after)
    return _submit_chain(chain, wanted, after)


def _submit_chain(chain: Chain, wanted: Wanted, after: Sequence[Submission | Conversion]) -> Submission:
    """What comes first, the run or the sweep itself, and what follows."""
    first, given = _first(chain, wanted)
    links = [*after, *first]
    wanted = replace(wanted, after=_awaited(links), overrides=[*wanted.overrides, *given])
    done = _submitted(wanted)
    done.first = links
    try:
        _follow(chain, wanted, done)
    finally:
        name = "" if wanted.dry_run else str(done.runs[0].settings()["name"])
        if name and (chain.first or chain.then or find_chain(name, wanted.runs)):
            record(name, wanted.runs, _conversions(done), _runs(done))
    return done


def _submitted(wanted: Wanted) -> Submission:
    """The run, or the runs of the sweep, alone."""
    sweep = load_sweep(wanted.recipe, wanted.overrides, site=wanted.site)
    if sweep is not None:
        done = submit_sweep(wanted, sweep)
        return Submission(done.name, done.runs, done.jobs)
    one = submit_run(wanted)
    return Submission(one.run.name, [one.run], {one.run.name: one.job} if one.job else {})


def _first(chain: Chain, wanted: Wanted) -> tuple[list[Submission | Conversion], list[str]]:
    """Start what comes first; with it the keys that are given the folders of its runs, as key=value."""
    links: list[Submission | Conversion] = []
    given: list[str] = []
    for one in chain.first:
        if isinstance(one, Convert):
            links.append(_converted(one, wanted))
            continue
        run = _before(one, wanted, links)
        links.append(run)
        if one.gives and len(run.runs) > 1:
            raise UserError(f"first: {one.recipe} is a sweep; {one.gives[0]} can be given one run alone")
        # as the folder of runs was typed: a chain that is moved with it is the same
        folder = json.dumps(str(wanted.runs / run.path.name))
        given += [f"{key}={folder}" for key in one.gives]
    return links, given


def awaited(chain: Chain, recipe: Path, *, runs: Path, site: str | None) -> tuple[list[Path], list[str]]:
    """What of a recipe's `first` is not made yet, and the keys that are given its runs, as key=value."""
    wanted = Wanted(recipe, runs=runs, site=site, dry_run=True, quick=True, say=lambda line: None)
    links, given = _first(chain, wanted)
    return [one.path.absolute() for one in _awaited(links)], given


def _before(one: Before, wanted: Wanted, links: Sequence[Submission | Conversion]) -> Submission:
    """Another run that comes first, after those conversions that come before it."""
    beside = wanted.recipe.parent / one.recipe
    recipe = beside if beside.is_file() else Path(one.recipe)
    chain = (*wanted.chain, (recipe.resolve(), one.overrides))
    if chain[-1] in wanted.chain:
        raise UserError(f"first: {one.recipe} would have to be finished before itself; remove it there")
    if wanted.dry_run:
        wanted.say(f"first: the run of {one.recipe}")
    return submit(
        recipe,
        one.overrides,
        runs=wanted.runs,
        site=wanted.site,
        executor=wanted.executor,
        follow=wanted.follow,
        dry_run=wanted.dry_run,
        quick=wanted.quick,
        after=[link for link in links if isinstance(link, Conversion)],
        say=wanted.say,
        trainee=wanted.trainee,
        chain=chain,
    )


def _converted(one: Convert, wanted: Wanted) -> Conversion:
    chosen = executors.choose(wanted.executor, lambda line: None)
    conversion = Conversion(one.out)
    if wanted.dry_run:
        state = conversion.state
        tasks = f" by an array of {one.jobs} jobs" if chosen == "slurm" else ""
        wanted.say(f"first: {one.convert} to {one.out}{tasks}" + f" ({state})" * (state != "STOPPED"))
        return conversion
    return convert(
        one.convert,
        one.inputs,
        out=one.out,
        options=one.options,
        executor=chosen,
        jobs=one.jobs,
        cluster=one.cluster,
        site=wanted.site,
        say=wanted.say,
    )


def _awaited(links: Sequence[Submission | Conversion]) -> list[Awaited]:
    """What of that has not finished, with the jobs that a run is to wait for."""
    found = []
    for link in links:
        if isinstance(link, Conversion):
            made = link.state
            if made == "UNKNOWN":
                raise UserError(f"{link.name}: SLURM, where it is made, gives no answer. Try again later.")
            if made in ("RUNNING", "PENDING"):
                link.refuse_failed()
            if made != "FINISHED":
                found.append(Awaited(link.out, tuple(link.queued(Queue()))))
            continue
        for run, state in zip(link.runs, link.states(fresh=True), strict=True):
            if state.name != "FINISHED" or state.queued:
                jobs = (state.job,) if state.queued and state.job else ()
                found.append(Awaited(run.path, jobs, (run.path,)))
    return found


def _follow(chain: Chain, wanted: Wanted, done: Submission) -> None:
    """Queue what follows each run, for a sweep in a place for each of its runs."""
    if chain.then and wanted.executor == "none":
        wanted.say("what follows is left out: nothing is started")
        return
    for step in chain.then:
        for run in done.runs:
            order = order_of(step, "" if run.name == done.name else run.name)
            if wanted.dry_run:
                say_step(run, order, wanted.say)
                continue
            link, job = submit_step(run, order, wanted.say)
            done.then.append(Submission(link.name, [link], {link.name: job} if job else {}))


def _conversions(done: Submission) -> list[Path]:
    found = []
    for link in done.first:
        found += [link.out] if isinstance(link, Conversion) else _conversions(link)
    return found


def _runs(done: Submission) -> list[Run]:
    before = [run for link in done.first if isinstance(link, Submission) for run in _runs(link)]
    return [*before, *done.runs, *(run for step in done.then for run in step.runs)]


def convert(
    kind: str,
    inputs: Sequence[str | Path] = (),
    *,
    out: str | Path,
    options: Mapping[str, Any] | None = None,
    executor: str | None = None,
    jobs: int = 4,
    cluster: Sequence[str] = (),
    site: str | None = None,
    say: Callable[[str], None] = print,
) -> Conversion:
    """Convert data into shards: on SLURM by an array of `jobs` tasks, on this machine before this returns.

    `options`: those of `clipcluster shards convert KIND`, by their names with underscores; `cluster`: what
    the tasks ask for, such as partition=low. Raises UserError.
    """
    chosen = executors.choose(executor, say)
    more = {"executor": chosen, "jobs": jobs, "cluster": cluster, "site": site, "say": say}
    return start_conversion(kind, inputs, out, options or {}, **more)  # type: ignore[arg-type]


def export(
    run: Submission,
    kind: Literal["open_clip", "hf", "safetensors", "onnx"],
    *,
    out: str | Path,
    weights: Literal["ema", "raw"] | None = None,
    say: Callable[[str], None] = print,
) -> Submission:
    """Export a run once it has finished, by a job of its own. Raises UserError."""
    return _step(run, Export(export=kind, out=os.path.abspath(out), weights=weights), say)


def evaluate(
    run: Submission,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    out: str | Path,
    weights: Literal["ema", "raw"] | None = None,
    say: Callable[[str], None] = print,
) -> Submission:
    """Evaluate a run once it has finished, by a job of its own, into a JSON file. Raises UserError."""
    texts = _texts(overrides) if isinstance(overrides, Mapping) else overrides
    return _step(run, Measure(evaluate=tuple(texts), out=os.path.abspath(out), weights=weights), say)


def _step(run: Submission, step: Export | Measure, say: Callable[[str], None]) -> Submission:
    if len(run.runs) != 1:
        raise UserError(f"{run.name} is a sweep of {len(run.runs)} runs; give one of its members")
    link, job = submit_step(run.runs[0], order_of(step), say)
    run.then.append(Submission(link.name, [link], {link.name: job} if job else {}))
    return run.then[-1]


def submission(name: str, *, runs: str | Path | None = None) -> Submission:
    """What was submitted before: a run, a sweep or a chain, by name or folder. UserError: there is none."""
    folder = runs_folder(Path(runs) if runs is not None else None)
    chain = find_chain(name, folder)
    if chain is not None and chain.runs:
        found = Submission(name, chain.runs)
        found.first = [Conversion(path) for path in chain.conversions]
        return found
    sweep = find_sweep(name, folder)
    return Submission(*sweep) if sweep else Submission(*_named(find_runs(name, folder)[0]))


def _texts(overrides: Mapping[str, Any]) -> list[str]:
    """``key=value`` in YAML, of which JSON is a part."""
    written = partial(json.dumps, default=_plain, ensure_ascii=False)
    return [f"{key}={written(value)}" for key, value in overrides.items()]


def _plain(value: Any) -> Any:
    """The numbers of an array, a path as text. TypeError for what a recipe cannot hold."""
    return value.tolist() if hasattr(value, "tolist") else os.fspath(value)
