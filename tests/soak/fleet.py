"""The runs of a soak: submitted as a user does it, on a sandbox, and compared with their twins at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipcluster.runs.checkpoints import name_of, newest_complete, read_manifest, unverified
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics
from jobs.submit.submit import Wanted, submit
from tests.consumed import merged_samples
from tests.soak.plan import STEP_SECONDS, Case
from tests.tiny_run import RECIPE, write_shards

MOMENTARY = frozenset({"attempt", "time", "samples_per_second", "data_wait_seconds"})
"""Columns of metrics that tell of the machine, not of the run."""


class Fleet:
    """Submits each case to `runs/`, or to `twins/` where nothing disturbs it."""

    def __init__(self, folder: Path, cases: list[Case], say: Callable[[str], None]) -> None:
        self.folder, self.cases, self._say = folder, cases, say
        self.runs: dict[int, Run] = {}
        self.recipe = folder / "soak.yaml"
        self.recipe.write_text(RECIPE.format(shards=write_shards(folder / "shards", count=60, per_shard=16)))

    def submit(self, case: Case, *, twin: bool = False) -> Run:
        """Submit it, again or for the first time. Raises UserError where its job is still ending."""
        submitted = submit(
            Wanted(
                recipe=self.recipe,
                overrides=self._overrides(case, twin),
                runs=self.folder / ("twins" if twin else "runs"),
                executor="slurm",
                quick=True,
                trainee="clipcluster.run:train" if case.torch else "trainee:train",
                say=lambda line: self._say(f"  {line}"),
            )
        )
        if not twin:
            self.runs[case.number] = submitted.run
        return submitted.run

    @staticmethod
    def _overrides(case: Case, twin: bool) -> list[str]:
        orders: dict[str, Any] = {
            "steps": case.steps,
            "seconds": 0 if twin else STEP_SECONDS,
            "save_every": max(5, case.steps // 60),
        }
        if case.fate == "fail":
            orders["raises"] = {"step": case.steps // 2, "rank": 0, "error": "DataError"}
        return [
            f"name={case.name}",
            f"seed={case.number}",
            f"train.duration={case.steps} steps",
            "train.log_every=1 steps",
            "train.record_samples=true",
            "data.batch_size=12",
            "data.workers=1",
            f"checkpoint.every={max(5, case.steps // 15)} steps",
            f"evaluate.every={case.steps // 3} steps",
            "cluster.partition=low",
            f"cluster.nodes={case.nodes}",
            f"cluster.tasks_per_node={case.tasks}",
            f"cluster.environment.TRAINEE='{json.dumps(orders)}'",
        ]


def differences(run: Run, twin: Run, steps: int) -> list[str]:
    """In what a finished run differs from its uninterrupted twin; empty where in nothing."""
    found = []
    last = name_of(steps)
    if newest_complete(run.checkpoints) != steps:
        return [f"its newest checkpoint is of step {newest_complete(run.checkpoints)}, not {steps}"]
    if reason := unverified(run.checkpoints / last):
        found.append(f"{last}: {reason}")
    one, other = (read_manifest(each.checkpoints / last) for each in (run, twin))
    found += [f"{last}/{name}" for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    if _logged(run) != _logged(twin):
        found.append("metrics.jsonl")
    if _consumed(run) != _consumed(twin):
        found.append("the samples consumed")
    return found


def _logged(run: Run) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in MOMENTARY} for line in merged_metrics(run)
    ]


def _consumed(run: Run) -> list[tuple[int, int, str, str]]:
    return [(line["step"], line["slot"], line["shard"], line["key"]) for line in merged_samples(run)]


def left_over(run: Run) -> list[Path]:
    """Files and folders that a process was writing, reading or removing when it ended."""
    return [
        path
        for path in run.path.rglob("*")
        if path.suffix in (".tmp", ".part") or path.name.startswith((".writing-", ".deleting-", "pinned-"))
    ]
