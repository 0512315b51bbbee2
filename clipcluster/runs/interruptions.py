"""What the earlier attempts of a run tell of lost work and of the cost of saves. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clipcluster.runs import files
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run

_TAIL_BYTES = 1 << 20  # a line with the results of an evaluation may be long


@dataclass(frozen=True)
class Interruptions:
    """What earlier attempts tell.

    trained_seconds: from the first batch of each to its last sign. count: how many ended with steps that no
    checkpoint holds. save_costs: seconds by which each save delayed the training, the oldest first.
    """

    trained_seconds: float = 0.0
    count: int = 0
    save_costs: tuple[float, ...] = ()


def interruptions(run: Run, before: int) -> Interruptions:
    """Of the attempts before number `before`, as rank 0 of each recorded them; damaged lines are left out."""
    seconds, count, costs = 0.0, 0, list[float]()
    for attempt in run.attempts():
        if attempt.number < before:
            trained, lost, measured = _told_by(attempt)
            seconds, count, costs = seconds + trained, count + lost, costs + measured
    return Interruptions(seconds, count, tuple(costs))


def _told_by(attempt: Attempt) -> tuple[float, bool, list[float]]:
    """Seconds that an attempt trained, whether it lost steps at its end, and what its saves cost."""
    events = files.read_lines(attempt.path / "events-rank-0.jsonl")
    saves = [event for event in events if event.get("event") == "checkpoint"]
    costs = [event["cost"] for event in saves if _is_number(event.get("cost"))]
    opened = [event.get("time") for event in events if event.get("phase") == "first batch"]
    logged = files.read_lines(attempt.path / "metrics.jsonl", last_bytes=_TAIL_BYTES)[-1:]
    signs = [line["time"] for line in (*saves[-1:], *logged) if _is_number(line.get("time"))]
    if not (opened and signs and _is_number(opened[0])):
        return 0.0, False, costs
    kept = [event for event in events if event.get("event") in ("resume", "roll_back", "checkpoint")]
    held = max((event["step"] for event in kept[-1:] if _is_number(event.get("step"))), default=0)
    reached = max((line["step"] for line in logged if _is_number(line.get("step"))), default=0)
    return max(0.0, max(signs) - opened[0]), reached > held, costs


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
