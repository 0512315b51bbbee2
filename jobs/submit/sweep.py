"""What `clipcluster submit` does with a sweep: each member is a run; those that need a job get one array.

Members that run, wait or have finished are left as they are: a sweep that is submitted again with more values
starts the new ones, and resumes those that ended before their last step.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from clipcluster.check import plain
from clipcluster.errors import UserError
from clipcluster.recipe.load import result_keys
from clipcluster.recipe.sweep import Member, Sweep
from clipcluster.runs.folder import Run
from clipcluster.runs.names import run_name
from clipcluster.runs.sweeps import array_folder, join, run_of
from clipcluster.text import counted
from jobs.state import Queue, State
from jobs.submit import assets, checking, evaluations, executor, launch, parameters, waiting
from jobs.submit.prepared import Prepared, folder_alone, grace_of, prepare
from jobs.submit.recorded import launched_array
from jobs.submit.submit import (
    as_it_is,
    checked_for,
    only_submission,
    refuse_unqueued,
    say_flags,
    settled,
    start,
)
from jobs.submit.wanted import Wanted

SHOWN = 20  # members that are named one by one
# What the check beyond the plain one does not look at: members that differ in it alone are examined once.
UNEXAMINED = ("name", "seed", "checks")


@dataclass(frozen=True)
class SubmittedSweep:
    """The members of a sweep, and the jobs of those that are queued: name of the run -> job."""

    name: str
    runs: list[Run]
    jobs: dict[str, str]


@dataclass(frozen=True)
class Found:
    """A member as it is at the submission."""

    member: Member
    checked: plain.Checked
    run: Run
    state: State

    @property
    def rests(self) -> bool:
        """Whether it needs no job."""
        return self.state.queued or self.state.name == "FINISHED"


@dataclass
class Said:
    """What is said of several members: each text once, with the members where it is not about all."""

    whom: dict[str, list[str]] = field(default_factory=dict)

    def of(self, label: str) -> Callable[[str], None]:
        """Takes what is said of one member."""
        return lambda text: self.whom.setdefault(text, []).append(label or "the recipe as it is")

    def lines(self, members: int) -> list[str]:
        return [
            text if len(set(labels)) == members else f"{text} (in {_several(labels)})"
            for text, labels in self.whom.items()
        ]


def _several(labels: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(labels))
    more = f" and {len(distinct) - 3} more" if len(distinct) > 3 else ""
    return ", ".join(distinct[:3]) + more


def submit_sweep(wanted: Wanted, sweep: Sweep) -> SubmittedSweep:
    """Check all members, then start those that need it. Raises UserError, with nothing started."""
    chosen = executor.choose(wanted.executor, wanted.say)
    refuse_unqueued(wanted, chosen)
    checked = check_members(wanted, sweep, chosen)
    name = checked[0].recipe.name
    runs = _runs(wanted, sweep, checked)
    found = _look(wanted, sweep, checked, runs)
    if chosen != "none":
        launch.refuse_patterns(wanted.runs)
    _say_members(name, found, wanted)
    _say_findings([one for one in found if not one.rests], wanted)
    if wanted.dry_run:
        _complete(wanted, found, chosen, None)
        _say_plan(name, sweep, found, chosen, wanted)
        return SubmittedSweep(name, runs, {})
    with tempfile.TemporaryDirectory(prefix="clipcluster-assets-") as aside:
        fetched = Path(aside)
        for one in (one for one in found if not one.rests):
            for asset in assets.fetch(one.checked.recipe, one.run.assets if one.run.exists() else fetched):
                wanted.say(f"fetched {asset}")
        _complete(wanted, found, chosen, fetched)
        with only_submission(wanted.runs, wanted.say):
            found = _look(wanted, sweep, checked, runs)  # somebody may have submitted it during the checks
            jobs = _start(name, sweep, found, chosen, wanted, fetched)
    return SubmittedSweep(name, runs, jobs)


def check_sweep(wanted: Wanted, sweep: Sweep) -> list[Found]:
    """What `clipcluster check` says of a sweep; the deep check too unless `quick`. Raises UserError."""
    chosen = executor.likely()
    checked = check_members(wanted, sweep, chosen)
    new, runs = State("NEW"), _runs(wanted, sweep, checked)
    found = [Found(*one, new) for one in zip(sweep.members, checked, runs, strict=True)]
    wanted.say(f"{checked[0].recipe.name}: a sweep of {counted(len(found), 'run')}")
    _say_runs(found, wanted)
    _say_findings(found, wanted)
    _complete(wanted, found, chosen, None)
    wanted.say(f"{wanted.recipe}: no problems found")
    return found


def check_members(wanted: Wanted, sweep: Sweep, chosen: str) -> list[plain.Checked]:
    """The plain check of every member; what is said of all of them is said once. Raises UserError."""
    errors, said, checked = Said(), Said(), []
    for member in sweep.members:
        try:
            quiet = replace(wanted, say=said.of(member.label))
            checked.append(checked_for(quiet, chosen, member))
        except UserError as error:
            errors.of(member.label)(str(error))
    if errors.whom:
        raise UserError("\n".join(errors.lines(len(sweep.members))))
    for line in said.lines(len(sweep.members)):
        wanted.say(line)
    return checked


def _runs(wanted: Wanted, sweep: Sweep, checked: Sequence[plain.Checked]) -> list[Run]:
    """Each member's run: one of the same result keys that had another name before, where no other fits it."""
    names = [run_name(one.loaded.title, result_keys(one.loaded)) for one in checked]
    digits = Counter(name[-8:] for name in names)
    runs = []
    for one, name, member in zip(checked, names, sweep.members, strict=True):
        alone = digits[name[-8:]] == 1
        asked = one.recipe.name, one.loaded.title, result_keys(one.loaded), wanted.runs, member.plain()
        runs.append(run_of(*asked) if alone else Run(wanted.runs / name))
    twice = next((run for run, count in Counter(run.name for run in runs).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"two members of the sweep would be the run {twice}; give keys that tell them apart")
    return runs


def _look(wanted: Wanted, sweep: Sweep, checked: Sequence[plain.Checked], runs: Sequence[Run]) -> list[Found]:
    """The members as they are now. Raises UserError where a job of one is still ending."""
    queue = Queue()
    states = [settled(run, wanted, queue) for run in runs]
    return [Found(*one) for one in zip(sweep.members, checked, runs, states, strict=True)]


def _say_members(name: str, found: Sequence[Found], wanted: Wanted) -> None:
    fresh = [one for one in found if one.state.name == "NEW"]
    again = [one for one in found if not one.rests and one not in fresh]
    resting = Counter(one.state.name.lower() for one in found if one.rests)
    parts = [f"{len(fresh)} to start" if fresh else "", f"{len(again)} to resume" if again else ""]
    parts += [f"{count} {state}" for state, count in resting.items()]
    wanted.say(f"{name}: a sweep of {counted(len(found), 'run')}: {', '.join(filter(None, parts))}")
    for one in again:
        wanted.say(f"  {one.run.name} was {one.state}: it resumes from its last checkpoint")


def _say_plan(name: str, sweep: Sweep, found: Sequence[Found], chosen: str, wanted: Wanted) -> None:
    """What a dry run says."""
    starting = [one for one in found if not one.rests]
    if not starting:
        return
    _say_runs(starting, wanted)
    if chosen == "none":
        wanted.say("would make the folders, and start nothing")
    elif chosen == "local":
        wanted.say(f"would start them on this machine, {sweep.parallel or 1} at a time")
    else:
        graces = _Graces(chosen)
        prepared = [
            Prepared(one.run, one.checked.recipe, one.run.path / "code-N", graces.of(one.checked), False)
            for one in starting
        ]
        for group in _groups(prepared):
            array = _array(name, sweep, wanted)
            members = [(one.run, one.code) for one in group]
            flags = parameters.of_array(
                group[0].recipe.cluster, members, array, grace=group[0].grace, dependency=wanted.dependency
            )
            wanted.say(f"would submit to SLURM, for {counted(len(group), 'run')}:")
            say_flags(flags, wanted)


def _say_runs(found: Sequence[Found], wanted: Wanted) -> None:
    for one in found[:SHOWN]:
        plan = one.checked.plan
        wanted.say(f"  {one.run.name}" + (f": {counted(plan.total_steps, 'step')}" if plan else ""))
    if len(found) > SHOWN:
        wanted.say(f"  and {len(found) - SHOWN} more")


def _say_findings(found: Sequence[Found], wanted: Wanted) -> None:
    """What the plain check found, what is the same in several members once."""
    said = Said()
    for one in found:
        for line in [*one.checked.summary, *(f"warning: {text}" for text in one.checked.warnings)]:
            said.of(one.member.label)(line)
    for line in said.lines(len(found)):
        wanted.say(line)


def _complete(wanted: Wanted, found: Sequence[Found], chosen: str, fetched: Path | None) -> None:
    """The rest of the check for the members that start: of those that it cannot tell apart, for the first.

    What it finds is said, and added to the findings of every member that it is about. Raises UserError.
    """
    starting = [one for one in found if not one.rests]
    alike: dict[str, list[Found]] = {}
    for one in starting:
        alike.setdefault(_examined(one.checked), []).append(one)
    said = Said()
    for group in alike.values():
        first = group[0]
        there = first.run.assets if first.run.exists() else fetched
        ahead = first.checked.without_findings()
        ahead.unchecked += first.checked.unchecked
        quick = wanted.quick or wanted.dry_run
        label = first.member.label if len(alike) > 1 else ""
        others = [one.run for one in group[1:]]
        checking.complete(
            ahead,
            first.run,
            chosen,
            assets=there,
            quick=quick,
            others=others,
            refused_ends=fetched is not None,
            say=_named(label, wanted.say) if fetched else lambda line: None,
        )
        if ahead.errors and len(alike) > 1:
            raise UserError(f"{first.member.label}: " + "\n  ".join(ahead.errors))
        ahead.raise_errors()
        for one in group:
            one.checked.unchecked.clear()
            one.checked.add(ahead)
        for line in checking.table(ahead):
            said.of(first.member.label)(line)
    for line in said.lines(len(alike)):
        wanted.say(line)


def _named(label: str, say: Callable[[str], None]) -> Callable[[str], None]:
    """Says what it is given, after the label of a member."""
    return lambda text: say(f"{label}: {text}" if label else text)


def _examined(checked: plain.Checked) -> str:
    """What the check beyond the plain one looks at: all but durations, the seed, the optimizer's numbers."""
    keys = {
        key: value for key, value in checked.recipe.model_dump(mode="json").items() if key not in UNEXAMINED
    }
    numbers = (int, float)
    keys["optim"] = {key: value for key, value in keys["optim"].items() if type(value) not in numbers}
    keys["train"] = {key: value for key, value in keys["train"].items() if key != "duration"}
    return json.dumps([keys, checked.world_size], sort_keys=True, default=str)


class _Graces:
    """The grace time of each cluster section, SLURM asked once for each partition."""

    def __init__(self, chosen: str) -> None:
        self.chosen, self.known = chosen, dict[tuple[str, str], float]()

    def of(self, checked: plain.Checked) -> float:
        cluster = checked.recipe.cluster
        key = str(cluster.partition), str(cluster.grace)
        if key not in self.known:
            self.known[key] = grace_of(checked.recipe, self.chosen)
        return self.known[key]


def _start(
    name: str, sweep: Sweep, found: Sequence[Found], chosen: str, wanted: Wanted, fetched: Path
) -> dict[str, str]:
    """Make or update the folders, and launch; the jobs by the names of their runs."""
    prepared = _prepared(name, found, chosen, wanted, fetched)
    queued = [one for one in found if one.state.queued]
    jobs = {one.run.name: one.state.job for one in queued if one.state.job}
    if chosen == "local" and prepared:
        _local(name, sweep, prepared, [one.run for one in queued], wanted)
    elif prepared:
        jobs |= _queue(name, sweep, prepared, jobs, wanted)
    for each in prepared:
        if not each.made:
            evaluations.resume(each.run, wanted.say, watched=each.recipe.evaluate.where == "job")
    return jobs


def _prepared(
    name: str, found: Sequence[Found], chosen: str, wanted: Wanted, fetched: Path
) -> list[Prepared]:
    """Make or update the folders; those to launch. None that was made outlives an error."""
    quiet = replace(wanted, say=lambda text: None)
    graces = _Graces(chosen)
    prepared: list[Prepared] = []
    try:
        for one in found:
            if one.rests:
                as_it_is(one.run, one.state, quiet)
            elif chosen == "none":
                folder_alone(one.run, one.checked, wanted, fetched)
            else:
                like = prepared[0].code if prepared else None
                grace = graces.of(one.checked)
                prepared.append(prepare(one.run, one.checked, chosen, quiet, fetched, grace=grace, like=like))
            join(one.run, name, one.member.plain())
        array_folder(name, wanted.runs).mkdir(parents=True, exist_ok=True)
    except BaseException:
        for each in prepared:
            each.undo()
        raise
    return prepared


def _array(name: str, sweep: Sweep, wanted: Wanted) -> parameters.Array:
    folder = array_folder(name, wanted.runs).absolute()
    return parameters.Array(name, str(folder), folder / "submitit", sweep.parallel)


def _groups(prepared: Sequence[Prepared]) -> list[list[Prepared]]:
    """Members whose jobs ask for the same, script included: an array's jobs differ in their run alone."""
    groups: dict[str, list[Prepared]] = {}
    nothing = parameters.Array("", "", Path())
    for one in prepared:
        own = one.recipe.evaluate.where == "job"
        asks = parameters.of_array(
            one.recipe.cluster, [], nothing, grace=one.grace, used=one.used, evaluations=own
        )
        image = str(one.recipe.cluster.container)  # on srun's line, which is no parameter
        groups.setdefault(json.dumps([asks, image], sort_keys=True), []).append(one)
    return list(groups.values())


def _dependency(sweep: Sweep, jobs: Iterable[str], wanted: Wanted) -> str:
    """What further jobs of a sweep wait for: where only so many may run at once, its `jobs` on SLURM too."""
    others = dict.fromkeys(job.partition("_")[0] for job in jobs if not job.startswith("local-"))
    behind = f"afterany:{':'.join(others)}" if sweep.parallel and others else ""
    return ",".join(filter(None, (wanted.dependency, behind)))


def _queue(
    name: str, sweep: Sweep, prepared: Sequence[Prepared], queued: Mapping[str, str], wanted: Wanted
) -> dict[str, str]:
    """Submit to SLURM: an array for members that ask for the same, an ordinary job for one that is alone.

    `queued`: the jobs of other members.
    """
    jobs: dict[str, str] = {}
    groups = _groups(prepared)
    for number, group in enumerate(groups):
        dependency = _dependency(sweep, [*queued.values(), *jobs.values()], wanted)
        try:
            if len(group) == 1:
                ids = [start(group[0], "slurm", wanted, dependency)]
            else:
                ids = launched_array(
                    group,
                    _array(name, sweep, wanted),
                    trainee=wanted.trainee,
                    say=wanted.say,
                    dependency=dependency,
                )
        except UserError as refusal:
            refused = groups[number + 1 :] if isinstance(refusal, launch.NoAnswer) else groups[number:]
            for one in (one for each in refused for one in each):
                one.undo()
            raise
        jobs |= {one.run.name: job for one, job in zip(group, ids, strict=True)}
        at_once = f", {sweep.parallel} at a time" if sweep.parallel and len(group) > 1 else ""
        waits = f" ({dependency})" if dependency else ""
        wanted.say(f"{name}: {counted(len(group), 'run')} as job {ids[0].partition('_')[0]}{at_once}{waits}")
    wanted.say(executor.devices(prepared[0].recipe.cluster, "slurm"))
    return jobs


def _local(
    name: str, sweep: Sweep, prepared: Sequence[Prepared], queued: Sequence[Run], wanted: Wanted
) -> None:
    """Hand the members to a process that starts one after the other on this machine; no job is known yet.

    `queued`: other members, which end before.
    """
    at_once = sweep.parallel or 1
    logs = array_folder(name, wanted.runs).absolute()
    waiting.hand_over(prepared, logs, parallel=at_once, trainee=wanted.trainee, behind=queued)
    wanted.say(f"{name}: {counted(len(prepared), 'run')} on this machine, {at_once} at a time")
    wanted.say(executor.devices(prepared[0].recipe.cluster, "local"))
