"""How long the steps and saves of a run take, as its earlier attempts measured them. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from clipcluster.runs import files
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import events

_TAIL_BYTES = 65536


def seconds_of_a_save(run: Run) -> float:
    """Seconds that the slowest of the run's last three saves took; 0.0 before the first."""
    saves = [event.get("seconds") for event in events(run) if event["event"] == "checkpoint"]
    return max((float(taken) for taken in saves[-3:] if isinstance(taken, int | float)), default=0.0)


def seconds_of_a_step(run: Run) -> float:
    """The median over the last lines of metrics, the wait for data included; 0.0 before the first."""
    for attempt in reversed(run.attempts()):
        lines = files.read_lines(attempt.path / "metrics.jsonl", last_bytes=_TAIL_BYTES)
        found = [
            line["samples"] / line["step"] / line["samples_per_second"]
            for line in lines
            if line.get("step") and line.get("samples") and line.get("samples_per_second")
        ]
        if found:
            from statistics import median  # which loads more than a check has time for

            return float(median(found))
    return 0.0


def seconds_to_stop(run: Run) -> float:
    """Seconds from a request to stop to the durable checkpoint, at most; 0.0 before the first save,
    and where the folder cannot be read.

    The step under way may have just begun, and so may a save in the background, which is finished first.
    """
    try:
        save = seconds_of_a_save(run)
        return 2 * seconds_of_a_step(run) + 2 * save if save else 0.0
    except OSError:  # it is told where the run is claimed
        return 0.0


def suspect_nodes(events: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Nodes whose ranks were slow, or held up the others until the attempt stalled, in two attempts or more.

    They are returned with the numbers of these attempts. events: those of all attempts.
    """
    found: dict[str, set[int]] = {}
    for event in events:
        if event["event"] in ("slow", "stalled"):
            for node in event.get("nodes", ()):
                found.setdefault(node, set()).add(event["attempt"])
    return {node: sorted(attempts) for node, attempts in sorted(found.items()) if len(attempts) > 1}
