"""What a run's folder tells of a checkpoint: for the model card. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from clipcluster.data.storage.urls import redacted_within
from clipcluster.runs.checkpoints import MANIFEST, STATE, step_of
from clipcluster.runs.files import read_object
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import lines, merged_metrics


@dataclass(frozen=True)
class Facts:
    """Of one checkpoint, and of its run as far as it has come. Keys and addresses are left out.

    recipe: the result keys, paths as written. state, manifest: of the checkpoint. evaluation: the document of
    the last evaluation up to the checkpoint's step, if any. device_hours: of all attempts, over their ranks.
    samples_per_second: the median of the lines of metrics; None without one.
    """

    recipe: Mapping[str, Any]
    state: Mapping[str, Any]
    manifest: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None
    attempts: int
    device_hours: float
    samples_per_second: float | None
    sources: list[dict[str, Any]] = field(default_factory=list)


def facts_of(checkpoint: Path) -> Facts | None:
    """What is known of a checkpoint of a run; None where it lies in none."""
    run = Run(checkpoint.parent.parent)
    step = step_of(checkpoint.name)
    if step is None or not run.exists():
        return None
    state = read_object(checkpoint / STATE) or {}
    rates = [line.get("samples_per_second") for line in merged_metrics(run)]
    known = [rate for rate in rates if isinstance(rate, (int, float))]
    return Facts(
        recipe=redacted_within(run.recipe()),
        state=state,
        manifest=read_object(checkpoint / MANIFEST) or {},
        evaluation=_evaluation(run, step),
        attempts=len(run.attempts()),
        device_hours=_device_seconds(run) / 3600,
        samples_per_second=median(known) if known else None,
        sources=[source for source in state.get("index") or [] if isinstance(source, dict)],
    )


def _evaluation(run: Run, step: int) -> dict[str, Any] | None:
    """The newest evaluation of a step up to this one."""
    steps = {step_of(path.stem): path for path in run.evals.glob("step-*.json")}
    done = [number for number in steps if number is not None and number <= step]
    return read_object(steps[max(done)], metrics=dict) if done else None


def _device_seconds(run: Run) -> float:
    """Over the attempts: from the first rank's start to the last sign of the attempt, times its ranks."""
    ranks: dict[int, set[Any]] = {}
    signs: dict[int, list[float]] = {}
    rank_events = list(lines(run, "events-rank-*.jsonl", event=str))
    for line in rank_events:
        if line["event"] == "start":
            ranks.setdefault(line["attempt"], set()).add(line.get("rank"))
    for line in [*rank_events, *lines(run, "metrics.jsonl")]:
        if line["attempt"] in ranks and isinstance(line.get("time"), (int, float)):
            signs.setdefault(line["attempt"], []).append(line["time"])
    return sum(len(ranks[number]) * (max(times) - min(times)) for number, times in signs.items())
