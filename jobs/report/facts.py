"""What the page says of one run, read from its folder."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from clipcluster.data.storage.urls import redacted_within
from clipcluster.errors import UserError
from clipcluster.evals.headline import COUNTS, HEADLINE, Result, ordered
from clipcluster.runs import files
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.checkpoints import MANIFEST, STATE, name_of, newest_complete
from clipcluster.runs.columns import Columns, columns_of, merged
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import bad_samples, events
from clipcluster.runs.names import flat
from jobs.accounting import device_seconds, goodput
from jobs.report.timeline import AttemptSummary, summary
from jobs.state import Queue, State, last_metrics, state_of, total_steps
from jobs.status import accounts_of

NOT_COMPARED = re.compile(r"(name|code|executor)$|(paths|plan)\.")
"""Dotted keys of the settings that say nothing about a run beside another."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: `results` are SET/METRIC -> value."""

    step: int
    attempt: int | None
    averaged: bool
    results: Mapping[str, float | None]

    @property
    def kinds(self) -> dict[Any, list[Result]]:
        """The results by kind, the headline first."""
        return ordered(self.results)

    @property
    def headline(self) -> dict[str, Result]:
        """The figures that people look at first, by SET/METRIC."""
        every = [result for own in self.kinds.values() for result in own]
        return {one.name: one for one in every if one.name.rpartition("/")[2] in HEADLINE}


@dataclass(frozen=True)
class Bad:
    """Bad samples of the run: their number, and the numbers by shard and by reason, most first."""

    count: int
    shards: list[tuple[str, int]]
    reasons: list[tuple[str, int]]


@dataclass(frozen=True)
class Facts:
    """One run. `step`: the one that it has reached, as `clipcluster status` says it; an attempt that ended
    without a save may have logged later ones, which are not part of the run. `logged`: its metrics by step.
    `keys`: recipe and settings by dotted key; those of `result_keys` decide the weights."""

    run: Run
    state: str
    detail: str
    advice: str
    step: int
    total_steps: int | None
    logged: Columns
    attempts: list[AttemptSummary]
    evaluations: list[Evaluation]
    bad: Bad
    skipped: list[tuple[int, int]]
    set_aside: list[tuple[str, str]]
    recipe: str
    settings: str
    keys: Mapping[str, Any]
    result_keys: frozenset[str]
    provenance: list[tuple[str, str]]

    @property
    def name(self) -> str:
        return self.run.name

    def last(self, name: str) -> float | None:
        """The last finite value of a metric up to the run's step; None where there is none."""
        values = self.logged.get(name)
        if values is None:
            return None
        known = values[np.isfinite(values) & (self.logged["step"] <= self.step)][-1:].tolist()
        return float(known[0]) if known else None

    def spent(self, kind: str) -> float:
        """Seconds of all attempts on one of `accounting.KINDS`."""
        return sum(one.spent.get(kind, 0.0) for one in self.attempts)

    @property
    def seconds(self) -> float:
        """Seconds of all attempts, as long as they had their devices."""
        return sum(one.seconds for one in self.attempts)

    @property
    def goodput(self) -> float | None:
        """The fraction of the allocated device-seconds that went into steps that count."""
        return goodput(device_seconds(self.attempts))

    @property
    def rank_seconds(self) -> float:
        """The same for every rank."""
        return sum(one.seconds * max(1, one.ranks) for one in self.attempts)

    def best(self, name: str) -> tuple[int, Result] | None:
        """The step and result of the evaluation with the best value of a figure; None for a count."""
        if Result(name, None).kind is COUNTS:
            return None
        known = [(one.results.get(name), one.step) for one in self.evaluations]
        values = [(value, step) for value, step in known if value is not None and math.isfinite(value)]
        small = name.endswith(("_rank", "loss"))
        pick = min if small else max
        value, step = pick(values, key=lambda pair: pair[0], default=(None, 0))
        return (step, Result(name, value)) if values else None

    @property
    def skipped_steps(self) -> int:
        """Steps that were not finite, of all attempts."""
        return sum(one.skipped_steps for one in self.attempts)

    @property
    def happened(self) -> list[Mapping[str, Any]]:
        """Roll-backs and failed saves."""
        return [event for one in self.attempts for event in one.happened]

    @property
    def skipped_anything(self) -> bool:
        """Whether there is anything to say of samples, steps, batches or saves."""
        skipped = (self.bad.count, self.skipped_steps, self.happened, self.skipped, self.set_aside)
        return any(map(bool, skipped))

    @property
    def endings(self) -> dict[str, int]:
        """How the attempts before the last one ended, most first."""
        return dict(Counter(one.ending for one in self.attempts[:-1]).most_common())


def facts_of(run: Run, queue: Queue) -> Facts:
    """Everything about a run but its pictures. Raises UserError for a file of it that cannot be read."""
    state = state_of(run, queue)
    if not run.settings_file.exists():
        raise UserError(
            f"{run.settings_file} is missing: the run's folder was copied in part; copy it whole."
        )
    logs = [(attempt, columns_of(attempt)) for attempt in run.attempts()]
    attempts = _attempts(run, state, logs)
    recipe, settings = redacted_within(run.recipe()), _shown(run.settings())
    newest = newest_complete(run.checkpoints)
    reached = [step for step in ((last_metrics(run) or {}).get("step"), newest) if isinstance(step, int)]
    checkpoint = run.checkpoints / name_of(newest) if newest is not None else None
    saved = (files.read_object(checkpoint / STATE) if checkpoint else None) or {}
    return Facts(
        run=run,
        state=state.name,
        detail=state.detail,
        advice=state.advice,
        step=max(reached, default=0),
        total_steps=total_steps(run),
        logged=merged([columns for _, columns in logs]),
        attempts=attempts,
        evaluations=_evaluations(run),
        bad=_bad(run),
        skipped=[(first, past) for first, past in saved.get("skipped", [])],
        set_aside=_set_aside(run),
        recipe=_text(recipe),
        settings=_text(settings),
        keys={**flat(recipe), **flat(settings)},
        result_keys=frozenset(flat(recipe)),
        provenance=_provenance(run, attempts, checkpoint, saved),
    )


def _shown(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without what may be a key: the job's environment and `on_event` often hold tokens."""
    cluster = settings.get("cluster")
    if isinstance(cluster, Mapping) and isinstance(cluster.get("environment"), Mapping):
        names = dict.fromkeys(cluster["environment"], "…")
        settings = {**settings, "cluster": {**cluster, "environment": names}}
    if settings.get("on_event"):
        settings = {**settings, "on_event": "…"}
    return dict(redacted_within(settings))


def _attempts(run: Run, state: State, logs: Sequence[tuple[Attempt, Columns]]) -> list[AttemptSummary]:
    accounts, every = accounts_of(run, state), events(run)
    now = "" if state.ended else state.name.lower()
    newest = len(accounts) - 1
    return [
        summary(account, attempt, every, logged, now=now if number == newest else "")
        for number, (account, (attempt, logged)) in enumerate(zip(accounts, logs, strict=False))
    ]


def _text(mapping: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True) if mapping else ""


def _evaluations(run: Run) -> list[Evaluation]:
    found = []
    for path in sorted(run.evals.glob("step-*.json")):
        document = files.read_object(path, step=int, metrics=dict)
        if document is not None:
            averaged, attempt = bool(document.get("ema")), document.get("attempt")
            found.append(Evaluation(document["step"], attempt, averaged, document["metrics"]))
    return sorted(found, key=lambda one: one.step)


def _bad(run: Run) -> Bad:
    found = bad_samples(run)
    return Bad(
        len(found),
        Counter(str(one["shard"]) for one in found).most_common(),
        Counter(str(one.get("reason")) for one in found).most_common(),
    )


def _set_aside(run: Run) -> list[tuple[str, str]]:
    """Checkpoints that did not verify: folder and reason."""
    found = []
    for path in sorted(run.checkpoints.glob("broken-*")):
        why = files.read_object(path / "why.json") or {}
        found.append((path.name, str(why.get("reason") or "")))
    return found


def _provenance(
    run: Run, attempts: list[AttemptSummary], checkpoint: Path | None, saved: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Where the figures come from: code, versions, hosts, devices, data; (what, value)."""
    rows = [("run folder", str(run.path))]
    for code in dict.fromkeys(one.code for one in attempts if one.code):
        rows.append((code, _snapshot(run.path / code, [one.number for one in attempts if one.code == code])))
    manifest = (files.read_object(checkpoint / MANIFEST) if checkpoint else None) or {}
    versions = manifest.get("versions") or {}
    rows += [(str(program), str(version)) for program, version in versions.items()]
    if checkpoint is not None:
        rows.append(("newest checkpoint", checkpoint.name))
        rows.append(("ranks that wrote it", str(manifest.get("world_size") or "")))
    rows.append(("hosts", _counted(one.host for one in attempts if one.host)))
    devices = attempts[-1].devices if attempts else ()
    rows.append(("devices of the last attempt", _counted(devices)))
    rows.append(("jobs", ", ".join(dict.fromkeys(one.job for one in attempts if one.job))))
    for source in saved.get("index", []):
        rows.append((f"data: {source.get('name')}", f"fingerprint {source.get('fingerprint')}"))
    for tower, digest in (saved.get("starting_weights") or {}).items():
        rows.append((f"starting weights: {tower}", f"SHA-256 {digest}"))
    return [(name, value) for name, value in rows if value]


def _counted(names: Any) -> str:
    """`a, 2 x b`."""
    counts = Counter(names)
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())


def _snapshot(code: Path, attempts: list[int]) -> str:
    facts = files.read_object(code / "snapshot.json") or {}
    commit, dirty = facts.get("commit"), facts.get("dirty")
    used = f"attempt{'s' if len(attempts) > 1 else ''} {_ranges(attempts)}"
    if not facts:
        return f"of {used}: its snapshot is gone"
    if commit is None:
        return f"of {used}: not from a git checkout; digest {facts.get('digest')}"
    clean = "with uncommitted changes (git.diff in the folder)" if dirty else "no uncommitted changes"
    return f"of {used}: commit {commit}, {clean}"


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as `1–3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


class Difference(NamedTuple):
    """A key in which runs differ. `values`: each run's, None where it has no such key."""

    key: str
    decides_weights: bool
    values: list[Any]


def differences(runs: list[Facts]) -> list[Difference]:
    """The keys of recipes and settings that differ between runs; those that decide the weights come first."""
    found = []
    for key in dict.fromkeys(key for facts in runs for key in facts.keys):
        values = [facts.keys.get(key) for facts in runs]
        if not NOT_COMPARED.match(key) and any(value != values[0] for value in values[1:]):
            found.append(Difference(key, any(key in facts.result_keys for facts in runs), values))
    return sorted(found, key=lambda one: not one.decides_weights)
