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
    """The run's metrics, one line a step, by step."""
    merged = {line["step"]: line for line in lines(run, "metrics.jsonl", step=int)}
    return [merged[step] for step in sorted(merged)]


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
