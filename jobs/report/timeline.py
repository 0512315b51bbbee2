"""The attempts of a run, and where the time of each went: from its claim, events, metrics and verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipcluster.runs.attempts import Attempt
from clipcluster.runs.columns import Columns, merged
from jobs.endings import history

KINDS = {
    "queue": "waiting in the queue",
    "start": "starting",
    "train": "training",
    "data": "waiting for data",
    "evaluate": "evaluating",
    "end": "ending",
}
"""What the time between two endings is spent on, in this order."""
SHORT = {
    "queue": "queue",
    "start": "start",
    "train": "training",
    "data": "data",
    "evaluate": "evaluation",
    "end": "ending",
}
"""The same, as heads of columns."""
PREEMPTED = "preempted"


@dataclass(frozen=True)
class AttemptSummary:
    """One attempt. Times are seconds since 1970, durations seconds; None is not known.

    first_step, last_step: where it resumed, and the last step that it is known to have done. repeated: steps
    of the attempt before that it did again. spent: by the names of `KINDS`. idle: before the run was
    submitted again. saves: how long each checkpoint took, written beside the training. skipped_steps: those
    that were not finite. happened: its roll-backs and failed saves.
    """

    number: int
    job: str
    host: str
    ranks: int
    devices: tuple[str, ...]
    code: str
    began: float | None
    ended: float | None
    ending: str
    reason: str
    first_step: int
    last_step: int
    repeated: int
    spent: Mapping[str, float]
    idle: float = 0.0
    saves: tuple[float, ...] = ()
    skipped_steps: int = 0
    happened: Sequence[Mapping[str, Any]] = ()

    @property
    def seconds(self) -> float:
        """From the claim to the end."""
        return sum(seconds for kind, seconds in self.spent.items() if kind != "queue")


def summaries(
    attempts: Sequence[tuple[Attempt, Columns]],
    events: Sequence[Mapping[str, Any]],
    submitted: Sequence[float],
    *,
    now: str = "",
) -> list[AttemptSummary]:
    """The attempts of a run with what each logged. `events`: of all. `submitted`: times of its submissions.

    now: what the newest one is doing, where it may still be at work.
    """
    found: list[AttemptSummary] = []
    for attempt, logged in attempts:
        own = [event for event in events if event["attempt"] == attempt.number]
        newest = attempt is attempts[-1][0]
        found.append(_summary(attempt, own, logged, submitted, found[-1:], now if newest else ""))
    return found


def _summary(
    attempt: Attempt,
    events: Sequence[Mapping[str, Any]],
    logged: Columns,
    submitted: Sequence[float],
    before: Sequence[AttemptSummary],
    now: str,
) -> AttemptSummary:
    claim, outcome, verdict = attempt.claim(), attempt.outcome() or {}, history.last_verdict(attempt) or {}
    began = claim.get("time")
    signs = [time for time in (began, *_times(events), *_last_times(logged)) if time]
    ended = verdict.get("time") or outcome.get("time") or max(signs, default=None)
    first = next((event.get("step") or 0 for event in events if event["event"] == "resume"), 0)
    reached = [event["step"] for event in events if isinstance(event.get("step"), int)]
    last = max([first, *reached, *logged["step"][-1:].tolist()])
    asked = [time for time in submitted if began is not None and time <= began]
    since = max([*asked[-1:], *(one.ended for one in before if one.ended)], default=began)
    previous = before[-1].ended if before else None
    started = [event for event in events if event["event"] == "start"]
    spent = {"queue": max(0.0, began - since) if began is not None and since is not None else 0.0}
    if began is not None and ended is not None:
        spent |= _spent(began, ended, events, logged, first)
    return AttemptSummary(
        number=attempt.number,
        job=str(claim.get("job") or ""),
        host=str(claim.get("host") or ""),
        ranks=len({event.get("rank") for event in started}),
        devices=tuple(str(event.get("device")) for event in events if event["event"] == "device"),
        code=str(attempt.settings().get("code") or ""),
        began=began,
        ended=ended,
        ending=now if now and not verdict else _ending(verdict, outcome),
        reason=str(verdict.get("reason") or outcome.get("reason") or ""),
        first_step=first,
        last_step=last,
        repeated=max(0, before[-1].last_step - first) if before else 0,
        spent=spent,
        idle=max(0.0, since - previous) if since is not None and previous is not None else 0.0,
        saves=tuple(_seconds(events, "checkpoint")),
        skipped_steps=int(np.nanmax(logged.get("skipped_steps", np.zeros(1)), initial=0)),
        happened=[event for event in events if event["event"] in ("roll_back", "checkpoint_failed")],
    )


def _ending(verdict: Mapping[str, Any], outcome: Mapping[str, Any]) -> str:
    """How it ended, as the verdict calls it; without one as the ranks do."""
    return str(verdict.get("ending") or outcome.get("outcome") or "ended without recording an outcome")


def _seconds(events: Sequence[Mapping[str, Any]], kind: str) -> list[float]:
    """How long each of these events says that it took."""
    found = (event.get("seconds") for event in events if event["event"] == kind)
    return [seconds for seconds in found if isinstance(seconds, (int, float))]


def _last_times(logged: Columns) -> list[float]:
    """When the last line was logged; empty where none was."""
    return [float(time) for time in logged.get("time", ())[-1:]]


def _times(events: Sequence[Mapping[str, Any]]) -> list[float]:
    return [event["time"] for event in events if isinstance(event.get("time"), (int, float))]


def _spent(
    began: float, ended: float, events: Sequence[Mapping[str, Any]], logged: Columns, first_step: int
) -> dict[str, float]:
    """The seconds from the claim to the end, by kind. Saves, beside the training, are no kind."""
    trained = _training_began(events, logged, first_step)
    if trained is None:
        return {"start": max(0.0, ended - began)}
    trained = min(max(trained, began), ended)
    evaluations = [event for event in events if event["event"] == "evaluation"]
    evaluated = sum(_seconds(events, "evaluation"))
    stops = [event for event in events if event["event"] == "stop_requested"]
    if stops:
        leaving = min(_times(stops))
    elif any(event["event"] == "finish" for event in events):
        leaving = max([*_last_times(logged), *_times(evaluations)], default=ended)
    else:
        leaving = ended
    leaving = min(max(leaving, trained), ended)
    waits = merged([logged]).get("data_wait_seconds")  # an evaluation repeats the line of its step
    waited = float(np.nansum(waits)) if waits is not None else 0.0
    rest = max(0.0, leaving - trained - evaluated)
    waited = min(waited, rest)
    return {
        "start": trained - began,
        "train": rest - waited,
        "data": waited,
        "evaluate": min(evaluated, leaving - trained),
        "end": ended - leaving,
    }


def _training_began(events: Sequence[Mapping[str, Any]], logged: Columns, first_step: int) -> float | None:
    """When the first step began: its line's time less what its rate says its samples took.

    Where no line was written: when the first batch was waited for; None where it never came to that.
    """
    waiting = [event for event in events if event.get("phase") == "first batch"]
    known = _times(waiting)[0] if waiting else None
    if len(logged["step"]) and all(name in logged for name in ("time", "samples", "samples_per_second")):
        step, rate = int(logged["step"][0]), float(logged["samples_per_second"][0])
        if rate > 0 and step > first_step:
            samples = float(logged["samples"][0]) / step * (step - first_step)
            return max(known or 0.0, float(logged["time"][0]) - samples / rate)
    return known
