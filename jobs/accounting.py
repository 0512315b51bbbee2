"""Where the allocated time of a run went: a pure function of what its attempts recorded. No torch.

Every second of an attempt, from the beginning of its allocation to its end, is of one kind of `ALLOCATED`.
What rank 0 measured (the events `spent`) says which; an attempt that left no such event is taken apart by its
other events. Steps that a later attempt did again, because nothing had saved them, are `lost`.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipcluster.runs import files
from clipcluster.runs.attempts import Attempt

KINDS = {
    "queue": "waiting in the queue",
    "requeue": "waiting in the queue again",
    "train": "training",
    "start": "starting",
    "rehearsal": "rehearsing the first step",
    "data": "waiting for data",
    "evaluate": "evaluating",
    "save": "waiting for saves",
    "stalled": "standing still",
    "lost": "steps done again",
    "end": "ending",
}
"""What the time of a run is spent on, in this order."""
WAITING = ("queue", "requeue")
ALLOCATED = tuple(kind for kind in KINDS if kind not in WAITING)
STEPS = ("train", "data")
"""What the time of a step consists of: lost where the step is done again."""
CLOCK_SECONDS = 5.0  # by so much a clock may be set between two records of a node
_TAIL_BYTES = (4096, 1 << 20)
_OF_RANK = re.compile(r"events-rank-(\d+)\.jsonl")


@dataclass(frozen=True)
class Told:
    """What an attempt recorded, as far as the accounting needs it. Times are seconds since 1970.

    began: when its allocation began, None where that is not known. events: of rank 0 and the batch side, by
    time. ranks: how many there were, by those that wrote something. lines: the last few of its metrics.
    others: of an attempt without a verdict, when it was claimed or another rank last recorded something.
    """

    number: int
    job: str
    began: float | None
    events: Sequence[Mapping[str, Any]]
    ranks: int = 1
    lines: Sequence[Mapping[str, Any]] = ()
    others: float | None = None

    @property
    def last_line(self) -> Mapping[str, Any]:
        """The last line of its metrics, empty before the first."""
        return self.lines[-1] if self.lines else {}


@dataclass(frozen=True)
class Account:
    """One attempt. Times are seconds since 1970, durations seconds; None is not known.

    ended: now, where it still runs. ending, reason: as the verdict has them, else the ranks; empty without.
    first_step, last_step: where it resumed, and the last step that it is known to have done. lost_steps:
    those of them that were done again, or have to be. spent: by `KINDS`. idle: from the end of the attempt
    before until the run was submitted again.
    """

    number: int
    job: str
    ranks: int
    began: float | None
    ended: float | None
    ending: str
    reason: str
    first_step: int
    last_step: int
    spent: Mapping[str, float]
    lost_steps: int = 0
    idle: float = 0.0

    @property
    def seconds(self) -> float:
        """From the beginning of the allocation to its end."""
        return sum(self.spent[kind] for kind in ALLOCATED)


def told_by(attempt: Attempt, *, alive: bool = False) -> Told:
    """Read what an attempt recorded. Raises UserError for a claim that cannot be read.

    alive: it still runs, so the time of its last record is not needed.
    """
    claim = attempt.claim()
    names = os.listdir(attempt.path)
    writers = [name for name in names if name.startswith("events-")]
    read = [name for name in writers if name == "events-rank-0.jsonl" or not name.startswith("events-rank-")]
    events = [line for name in read for line in files.read_lines(attempt.path / name) if _dated(line)]
    if "stalled" in names:  # some rank, perhaps not rank 0, has said so in its own file
        others = (files.read_lines(attempt.path / name) for name in {*writers}.difference(read))
        events += [line for lines in others for line in lines if _dated(line) and line["event"] == "stalled"]
    last = []
    if not alive and not any("ending" in event for event in events):  # rank 0 may have died before the others
        rest = (files.read_lines(attempt.path / name, last_bytes=_TAIL_BYTES[0]) for name in writers)
        last = [line["time"] for lines in rest for line in lines[-1:] if _dated(line)]
        last += _numbers(claim.get("time"))  # a node may die before anything else is recorded
    return Told(
        number=attempt.number,
        job=str(claim.get("job") or ""),
        began=next(iter(_numbers(claim.get("began"), claim.get("time"))), None),
        events=sorted(events, key=lambda line: float(line["time"])),
        ranks=max((int(match[1]) + 1 for match in map(_OF_RANK.fullmatch, names) if match), default=0),
        lines=_last_lines(attempt.path / "metrics.jsonl"),
        others=max(last, default=None),
    )


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The last few lines of metrics; one with the results of an evaluation may be long."""
    for size in _TAIL_BYTES:
        lines = files.read_lines(path, last_bytes=size)
        if lines:
            break
    return lines


def _dated(line: Mapping[str, Any]) -> bool:
    """Whether it is an event as the accounting reads it: of some time, and of a step or none."""
    has_step = isinstance(line.get("step"), (int, type(None)))
    return has_step and isinstance(line.get("event"), str) and isinstance(line.get("time"), (int, float))


def accounted(
    attempts: Sequence[Told],
    submitted: Mapping[str, float] | None = None,
    *,
    now: float | None = None,
    resumes_at: int | None = None,
) -> list[Account]:
    """Where the time of every attempt went. `submitted`: when each job of the run was, by its id.

    now: the time, where the newest attempt still runs. resumes_at: the step from which the next attempt would
    go on, where none runs and the run is not finished.
    """
    cuts = {int(_first(told, "resume").get("step") or 0) for told in attempts} | {resumes_at or 0}
    steps, found = _Steps(), list[Account]()
    for number, told in enumerate(attempts):
        later = (one.began for one in attempts[number + 1 :] if one.began is not None)
        until = next(later, None) if told is not attempts[-1] else now
        alive = told is attempts[-1] and now is not None
        account = _account(told, number, steps, cuts, until, alive=alive)
        found.append(_waited(account, found[-1:], submitted or {}))
    if resumes_at is not None:
        steps.back_to(resumes_at)
    return [steps.settled(account, number) for number, account in enumerate(found)]


def device_seconds(accounts: Sequence[Account]) -> dict[str, float]:
    """Seconds of all attempts by `KINDS`, each times its ranks: every rank has a device.

    An attempt of which no rank started counts with those of the largest one.
    """
    most = max((one.ranks for one in accounts), default=0) or 1
    return {kind: sum(one.spent[kind] * (one.ranks or most) for one in accounts) for kind in KINDS}


def goodput(spent: Mapping[str, float]) -> float | None:
    """The fraction of the allocated time that went into steps that count; None where there is none."""
    allocated = sum(spent[kind] for kind in ALLOCATED)
    return spent["train"] / allocated if allocated > 0 else None


@dataclass
class _Stretch:
    """Steps in a row of one attempt, from `first` (exclusive) to `last`, and what they took."""

    owner: int
    first: int
    last: int
    seconds: dict[str, float]


class _Steps:
    """The steps of a run and their seconds. Work that begins again at a step takes those after it away."""

    def __init__(self) -> None:
        self._stretches: list[_Stretch] = []
        self._lost: dict[tuple[int, str], float] = {}
        self._lost_steps: Counter[int] = Counter()

    def add(self, owner: int, first: int, last: int, seconds: Mapping[str, float]) -> None:
        self._stretches.append(_Stretch(owner, first, max(first, last), dict(seconds)))

    def lose(self, owner: int, steps: int) -> None:
        """Steps that were done again, of whose seconds nothing is known here."""
        self._lost_steps[owner] += max(0, steps)

    def back_to(self, step: int) -> None:
        """Steps after `step` are done again; of a stretch across it the part behind it is lost."""
        while self._stretches and self._stretches[-1].last > step:
            top = self._stretches.pop()
            cut = max(step, top.first)
            kept = (cut - top.first) / (top.last - top.first) if cut > top.first else 0.0
            self._lost_steps[top.owner] += top.last - cut
            for kind, seconds in top.seconds.items():
                key = (top.owner, kind)
                self._lost[key] = self._lost.get(key, 0.0) + (1 - kept) * seconds
            if kept:
                part = {kind: kept * seconds for kind, seconds in top.seconds.items()}
                self._stretches.append(_Stretch(top.owner, top.first, cut, part))

    def settled(self, account: Account, owner: int) -> Account:
        """The account with the seconds of its lost steps as lost."""
        spent = dict(account.spent)
        for kind in STEPS:
            lost = min(spent[kind], self._lost.get((owner, kind), 0.0))
            spent[kind] -= lost
            spent["lost"] += lost
        return replace(account, spent=spent, lost_steps=self._lost_steps[owner])


def _account(
    told: Told, number: int, steps: _Steps, cuts: Collection[int], until: float | None, *, alive: bool
) -> Account:
    """One attempt; its steps are added to `steps`.

    cuts: the steps at which an attempt resumes. until: when the next attempt began; of one that is `alive`,
    now. What an attempt wrote after that, on a node that had lost its job, was nobody's any more.
    """
    verdict: Mapping[str, Any] = next((one for one in reversed(told.events) if "ending" in one), {})
    left = _first(told, "finish", "stop", "fail")
    around = (event["time"] for event in (*told.events[:1], *told.events[-1:]))
    signs = [*around, *_numbers(told.last_line.get("time"), told.others)]
    began = told.began if told.began is not None else min(signs, default=None)
    alive = alive and not verdict
    ended = until if alive else verdict.get("time") or max(signs, default=began)
    first = int(_first(told, "resume").get("step") or 0)
    logged = told.last_line.get("step")
    reached = max((one.get("step") or 0 for one in told.events), default=0)
    spent = dict.fromkeys(KINDS, 0.0)
    if began is not None and ended is not None:
        own = _before(told, ended + CLOCK_SECONDS) if verdict else told
        marks = [mark for mark in _needed(_recorded(own), own, cuts) if _is_whole(mark)] or _estimated(own)
        ended = max(began, ended, *(mark["time"] for mark in marks if not verdict))
        if until is not None and until > began:  # else the clocks of two nodes differ
            ended = min(ended, until)
        if marks:
            spent |= _Attempt(number, steps, own, first, alive).taken_apart(marks, began, ended)
        else:
            spent["start"] = ended - began
    return Account(
        number=told.number,
        job=told.job,
        ranks=told.ranks,
        began=began,
        ended=ended,
        ending=str(verdict.get("ending") or ENDINGS.get(left.get("event", ""), "")),
        reason=str(verdict.get("reason") or left.get("reason") or ""),
        first_step=first,
        last_step=int(max(first, reached, logged if isinstance(logged, int) else 0)),
        spent=spent,
    )


def _before(told: Told, ended: float) -> Told:
    """What was recorded until then; what ranks on a node that SLURM lost wrote later is not counted."""
    events = [event for event in told.events if event["time"] <= ended]
    lines = [line for line in told.lines if max(_numbers(line.get("time")), default=ended) <= ended]
    return replace(told, events=events, lines=lines)


def _waited(account: Account, before: Sequence[Account], submitted: Mapping[str, float]) -> Account:
    """The account with what was waited before it: after the attempt `before` it, if its job was requeued."""
    began, ended = account.began, before[-1].ended if before else None
    if began is None:
        return account
    if before and before[-1].job == account.job:
        kind, since = "requeue", ended
    else:
        kind, since = "queue", submitted.get(account.job)
    asked = min(began, began if since is None else since)
    idle = max(0.0, asked - ended) if kind == "queue" and ended is not None else 0.0
    return replace(account, spent={**account.spent, kind: began - asked}, idle=idle)


ENDINGS = {"finish": "finished", "stop": "stopped", "fail": "failed"}
"""Events with which a rank leaves, and how the attempt is said to have ended where there is no verdict."""


def _first(told: Told, *kinds: str) -> Mapping[str, Any]:
    """The first of rank 0's events of these kinds; empty where there is none."""
    return next((one for one in told.events if one["event"] in kinds and "ending" not in one), {})


def _numbers(*values: Any) -> list[Any]:
    return [value for value in values if isinstance(value, (int, float))]


def _recorded(told: Told) -> list[Mapping[str, Any]]:
    """What rank 0 measured: `time`, `step`, and `seconds` by kind since it began to train."""
    return [one for one in told.events if one["event"] == "spent" and isinstance(one.get("seconds"), dict)]


def _is_whole(mark: Mapping[str, Any]) -> bool:
    return len(_numbers(*mark["seconds"].values())) == len(mark["seconds"])


def _needed(
    marks: Sequence[Mapping[str, Any]], told: Told, cuts: Collection[int]
) -> Sequence[Mapping[str, Any]]:
    """The marks around the steps at which an attempt resumes, and the last one: the others change no sum."""
    steps = [int(mark["step"]) for mark in marks if isinstance(mark.get("step"), int)]
    if (
        len(marks) < 4
        or len(steps) < len(marks)
        or any(one["event"] in ("roll_back", "stalled") for one in told.events)
    ):
        return marks
    around = {bisect_left(steps, cut) + side for cut in cuts for side in (-1, 0)} | {len(marks) - 1}
    return [marks[at] for at in sorted(around) if 0 <= at < len(marks)]


def _estimated(told: Told) -> list[Mapping[str, Any]]:
    """The same from the other events: it trains from its first batch on, but for the evaluations.

    Empty where no step is known.
    """
    openings = [
        one["time"] for one in told.events if one["event"] == "resume" or one.get("phase") == "first batch"
    ]
    if not openings:
        return []
    began, evaluated = max(openings), 0.0
    marks: list[Mapping[str, Any]] = [{"time": began, "step": None, "seconds": {}}]
    for event in told.events:
        if event["time"] < began or "ending" in event:
            continue
        if event["event"] == "evaluation":
            evaluated += sum(_numbers(event.get("seconds")))
        if event["event"] in ("checkpoint", "stop_requested", "finish", "stop"):
            passed = event["time"] - began
            seconds = {"evaluate": min(evaluated, passed), "train": max(0.0, passed - evaluated)}
            marks.append({"time": event["time"], "step": event.get("step"), "seconds": seconds})
        if event["event"] == "stop_requested":
            break
    return marks if len(marks) > 1 or told.lines else []


def _gained(marks: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Seconds by kind between each mark and the one before it."""
    before: Mapping[str, float] = {}
    found = []
    for mark in marks:
        seconds = mark["seconds"]
        found.append({kind: max(0.0, value - before.get(kind, 0.0)) for kind, value in seconds.items()})
        before = seconds
    return found


@dataclass
class _Attempt:
    """Takes an attempt that trained apart; its steps go to `steps` as those of `owner`."""

    owner: int
    steps: _Steps
    told: Told
    step: int
    alive: bool

    def __post_init__(self) -> None:
        self.roll_backs = [one for one in self.told.events if one["event"] == "roll_back"]
        self.stalls = [one for one in self.told.events if one["event"] == "stalled"]

    def taken_apart(self, marks: Sequence[Mapping[str, Any]], began: float, ended: float) -> dict[str, float]:
        """Seconds by kind, in all from `began` to `ended`."""
        self.steps.back_to(self.step)
        spent = dict.fromkeys(ALLOCATED, 0.0)
        gained = _gained(marks)
        last, total = min(ended, max(began, marks[-1]["time"])), sum(sum(taken.values()) for taken in gained)
        scale = min(1.0, (last - began) / total) if total > 0 else 1.0  # below 1 where a clock was set
        since = last - scale * total
        spent["start"] = since - began
        for mark, seconds in zip(marks, gained, strict=True):
            self._roll_backs(since, mark["time"])
            taken = {kind: scale * value for kind, value in seconds.items()}
            stood = min(self._stood(since, mark["time"]), taken.get("train", 0.0))
            if stood:
                taken |= {"train": taken["train"] - stood, "stalled": stood}
            self._take(spent, taken, mark.get("step"))
            since = mark["time"]
        self._rest(spent, last, ended)
        return spent

    def _take(self, spent: dict[str, float], taken: Mapping[str, float], step: Any) -> None:
        """Count seconds, and those of steps up to `step` as of steps."""
        for kind, seconds in taken.items():
            name = kind if kind in spent else "train"
            spent[name] += seconds
        reached = max(self.step, step) if isinstance(step, int) else self.step
        worked = {kind: taken[kind] for kind in STEPS if kind in taken}
        self.steps.add(self.owner, self.step, reached, worked)
        self.step = reached

    def _rest(self, spent: dict[str, float], since: float, ended: float) -> None:
        """Count the time after the last mark: the end, or work of which no record tells."""
        self._roll_backs(since, ended)
        rest = ended - since
        left = _first(self.told, "finish", "stop")
        if left:
            spent["end"] += rest
            return
        stood = min(rest, self._stood(since, ended, ends=not self.alive))
        spent["stalled"] += stood
        logged = self.told.last_line.get("step")
        reached = logged if isinstance(logged, int) else self.step
        if self.alive:
            self._take(spent, {"train": rest - stood}, reached)
        else:
            spent["lost"] += rest - stood
            self.steps.lose(self.owner, reached - self.step)

    def _roll_backs(self, since: float, until: float) -> None:
        for event in self.roll_backs:
            if since <= event["time"] <= until:
                self.step = int(event.get("step") or 0)
                self.steps.back_to(self.step)

    def _stood(self, since: float, until: float, *, ends: bool = False) -> float:
        """Seconds without a step that a watchdog saw in a span; where that `ends` the attempt, until then."""
        found = [one for one in self.stalls if since < one["time"] <= until]
        seconds = (sum(_numbers(one.get("seconds"))) + ends * (until - one["time"]) for one in found)
        return max(seconds, default=0.0)
