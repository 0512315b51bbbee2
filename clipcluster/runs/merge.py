"""Reading what all attempts wrote as one run.

Per step the highest attempt wins, within one the later line: an attempt that resumed from an earlier
checkpoint repeats steps that the one before had already logged.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from clipcluster.runs import files
from clipcluster.runs.folder import Run


def lines(run: Run, pattern: str, **types: type) -> Iterator[dict[str, Any]]:
    """Lines of all files that fit `pattern`, the earliest attempt's first, each with its `attempt`.

    A line that lacks a field named in `types`, or has it with another type, is left out like a torn one.
    """
    for attempt in run.attempts():
        for path in sorted(attempt.path.glob(pattern)):
            for line in chain.from_iterable(files.line_chunks(path)):
                if all(isinstance(line.get(name), kind) for name, kind in types.items()):
                    line["attempt"] = attempt.number
                    yield line


def merged_metrics(run: Run) -> list[dict[str, Any]]:
    """The run's metrics, one line a step, by step, with the results of evaluations that were jobs."""
    merged = {line["step"]: line for line in lines(run, "metrics.jsonl", step=int)}
    for path in run.evals.glob("step-*.json"):
        document = files.read_object(path, step=int, metrics=dict) or {}
        if "job" in document:  # what a training measures itself is in its own lines
            merged[document["step"]] = _with_results(merged.get(document["step"]), document)
    return [merged[step] for step in sorted(merged)]


def _with_results(line: dict[str, Any] | None, document: dict[str, Any]) -> dict[str, Any]:
    """The line of a step (None: it was not logged) with the results in a document of its evaluation."""
    about = ("step", "samples", "epoch", "attempt", "time")
    found = line or {key: document[key] for key in about if key in document}
    results = document["metrics"]
    missing = [name for name, value in results.items() if value is None]
    non_finite = sorted({*found.get(files.NON_FINITE, ()), *missing})
    return {**found, **results, **({files.NON_FINITE: non_finite} if non_finite else {})}


def events(run: Run) -> list[dict[str, Any]]:
    """Every event of the run, by attempt, then by time."""

    def when(line: dict[str, Any]) -> tuple[int, float]:
        time = line.get("time")
        return line["attempt"], time if isinstance(time, (int, float)) else 0.0

    return sorted(lines(run, "events-*.jsonl", event=str), key=when)


def bad_samples(run: Run) -> list[dict[str, Any]]:
    """The run's distinct bad samples (shard and key), each as it was first recorded."""
    distinct: dict[tuple[str, str], dict[str, Any]] = {}
    for line in lines(run, "bad_samples-*.jsonl", shard=str, key=str):
        distinct.setdefault((line["shard"], line["key"]), line)
    return list(distinct.values())
