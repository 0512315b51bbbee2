"""`clipcluster status`: what runs do, how far they are, and where their time went.

From the run folders and the queue alone: quick for hundreds of runs, and without sacct.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from clipcluster.errors import UserError
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.checkpoints import MANIFEST, name_of, newest_complete
from clipcluster.runs.folder import Run
from clipcluster.runs.sweeps import membership
from clipcluster.runs.timing import suspect_nodes
from jobs.accounting import KINDS, STEPS, Account, Told, accounted, device_seconds, goodput, told_by
from jobs.state import NOT_SHOWN_YET, Queue, State, evaluations_of, state_of, total_steps
from jobs.submissions import submissions

UNREADABLE = "UNREADABLE"
DATA_BOUND = 0.15  # the fraction of the last steps that waited for data, from which a run is called so
PACE_LINES = 10  # the last ones, which say how fast a run is
RUNS_A_PROCESS, PROCESSES = 50, 8  # reading takes a core: at most so many, and one for so many runs
ACTIVE = frozenset({"RUNNING", "COMPLETING"})


def recorded_by(run: Run, state: State) -> list[Told]:
    """What the run's attempts recorded, the oldest first."""
    attempts = run.attempts()
    return [told_by(one, alive=one is attempts[-1] and _is_alive(one, state)) for one in attempts]


def _is_alive(newest: Attempt | Told, state: State) -> bool:
    """Whether the newest attempt still runs."""
    return state.name in ACTIVE and state.detail != NOT_SHOWN_YET and newest.job == state.job


def accounts_of(run: Run, state: State, told: Sequence[Told] | None = None) -> list[Account]:
    """Where the time of the run's attempts went, until now."""
    if told is None:
        told = recorded_by(run, state)
    times = [(str(line["job"]), line.get("time")) for line in submissions(run)]
    alive = bool(told) and _is_alive(told[-1], state)
    resumed = alive and (told[-1].lines or any(one["event"] == "resume" for one in told[-1].events))
    to_resume = state.name not in ("FINISHED", "UNKNOWN") and not resumed
    return accounted(
        told,
        {job: time for job, time in times if isinstance(time, (int, float))},
        now=time.time() if alive else None,
        resumes_at=(newest_complete(run.checkpoints) or 0) if to_resume else None,
    )


def reports(runs: Sequence[Run], queue: Queue) -> list[dict[str, Any]]:
    """`report` of each run; of several, one that cannot be read is UNREADABLE, and `detail` says why.

    Raises UserError for the only one.
    """
    if len(runs) == 1:
        return [report(runs[0], queue)]
    if len(runs) < 2 * RUNS_A_PROCESS:
        return [_readable(queue, run) for run in runs]
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    queue.ask()  # once, for all processes
    processes = min(PROCESSES, max(2, os.cpu_count() or 1), len(runs) // RUNS_A_PROCESS)
    no_interrupt = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for them
    with ProcessPoolExecutor(processes, get_context("fork"), signal.signal, no_interrupt) as pool:
        return list(pool.map(partial(_readable, queue), runs, chunksize=-(-len(runs) // processes)))


def _readable(queue: Queue, run: Run) -> dict[str, Any]:
    """`report` of a run, or that it cannot be read."""
    try:
        return report(run, queue)
    except (UserError, OSError) as error:
        return {**_UNKNOWN, "name": run.name, "path": str(run.path), "detail": str(error)}


def report(run: Run, queue: Queue) -> dict[str, Any]:
    """One run in `clipcluster status`. What is not known is None; times are seconds since 1970.

    data_wait: the fraction of the last steps that waited for data. seconds_left: until the last step, by the
    speed of the last ones and what evaluations and saves took so far; None where no job is to do them.
    lost_seconds: of `lost_steps`, which were done again or have to be. ended: how the last attempt that ended
    did. slow: the ranks that hold up the others now, and their `nodes`. stalls: the attempts that
    stalled. suspect_nodes: with the attempts that each was slow or stalled in. notes: what people should know
    of these, a line each. seconds, device_seconds: by `jobs.accounting.KINDS`. evaluations: those that jobs
    of their own are to make, or failed to.
    """
    state = state_of(run, queue)
    told = recorded_by(run, state)
    accounts = accounts_of(run, state, told)
    logged = next((one for one in reversed(told) if one.lines), None)
    line: Mapping[str, Any] = logged.last_line if logged else {}
    checkpoint = newest_complete(run.checkpoints)
    step = max((step for step in (line.get("step"), checkpoint) if step is not None), default=None)
    total, event, ended = _total_steps(run, told), _last_event(told), _last_ended(accounts, state)
    pace, waits = _pace(logged.lines if logged else ())
    devices = device_seconds(accounts)
    return {
        "name": run.name,
        "path": str(run.path),
        **_membership(run),
        "state": state.name,
        "detail": state.detail,
        "advice": state.advice,
        "job": state.job,
        "attempt": told[-1].number if told else None,
        "step": step,
        "total_steps": total,
        "epoch": line.get("epoch"),
        "loss": line.get("loss"),
        "samples_per_second": line.get("samples_per_second"),
        "data_wait": waits,
        "seconds_left": None if state.ended else _left(step, total, pace, accounts),
        "checkpoint": checkpoint,
        "checkpoint_time": _written(run, checkpoint),
        "lost_steps": sum(one.lost_steps for one in accounts),
        "lost_seconds": sum(one.spent["lost"] for one in accounts),
        "ended": ended.ending if ended else None,
        "ended_reason": (ended.reason or None) if ended else None,
        "ended_time": ended.ended if ended else None,
        "seconds": {kind: sum(one.spent[kind] for one in accounts) for kind in KINDS},
        "device_seconds": devices,
        "goodput": goodput(devices),
        **_troubles(told, state, waits),
        "last_event": event.get("event"),
        "last_event_time": event.get("time"),
        "evaluations": [
            {"step": owed.step, "state": found.name, "detail": found.detail, "job": found.job}
            for owed, found in evaluations_of(run, queue)
        ],
    }


_UNKNOWN: Mapping[str, Any] = {
    **dict.fromkeys(
        (
            *("attempt", "step", "total_steps", "epoch", "loss", "samples_per_second", "data_wait", "job"),
            *("seconds_left", "checkpoint", "checkpoint_time", "ended", "ended_reason", "ended_time"),
            *("goodput", "last_event", "last_event_time", "lost_steps", "lost_seconds", "sweep"),
        )
    ),
    **dict.fromkeys(("seconds", "device_seconds"), dict.fromkeys(KINDS, 0.0)),
    "values": {},
    "suspect_nodes": {},
    **dict.fromkeys(("stalls", "notes", "evaluations"), ()),
    "slow": {"ranks": [], "nodes": []},
    "state": UNREADABLE,
    "advice": "",
}
"""What `report` says of a run that cannot be read."""


def groups(found: Sequence[Mapping[str, Any]]) -> list[tuple[str | None, list[Mapping[str, Any]]]]:
    """The reports by sweep, each where its first member is; every other run alone, with None."""
    grouped: dict[str, tuple[str | None, list[Mapping[str, Any]]]] = {}
    for one in found:
        key = f"sweep {one['sweep']}" if one["sweep"] else f"run {one['path']}"
        grouped.setdefault(key, (one["sweep"], []))[1].append(one)
    return list(grouped.values())


def together(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is said of a sweep as a whole, under the names that `report` has."""
    sums = {name: sum(one[name] or 0 for one in members) for name in ("attempt", "step", "lost_seconds")}
    totals = [one["total_steps"] for one in members]
    left = [one["seconds_left"] for one in members if one["seconds_left"] is not None]
    devices = {kind: sum(one["device_seconds"][kind] for one in members) for kind in KINDS}
    return {
        **sums,
        "states": dict(Counter(one["state"] for one in members)),
        "total_steps": None if None in totals else sum(totals),
        "seconds_left": max(left, default=None),
        "device_seconds": devices,
        "goodput": goodput(devices),
    }


def _membership(run: Run) -> dict[str, Any]:
    """`sweep` (None where it is in none) and `values`."""
    return membership(run) or {"sweep": None, "values": {}}


def _total_steps(run: Run, told: Sequence[Told]) -> int | None:
    """As an attempt recorded it; before any did, as the settings have it, which take longer to read."""
    for one in reversed(told):
        for event in reversed(one.events):
            if isinstance(event.get("total_steps"), int):
                return int(event["total_steps"])
    return total_steps(run)


def _last_event(told: Sequence[Told]) -> Mapping[str, Any]:
    """The newest attempt's last event that is one for people."""
    events = told[-1].events if told else ()
    return next((event for event in reversed(events) if event["event"] != "spent"), {})


def _last_ended(accounts: Sequence[Account], state: State) -> Account | None:
    """The last attempt that has ended; where it left no verdict, it ended as the state says."""
    newest = accounts[-1] if accounts else None
    if newest and not newest.ending and state.ended and state.name != "NEW" and newest.job == state.job:
        return replace(newest, ending=state.name.lower())
    return next((one for one in reversed(accounts) if one.ending), None)


def _troubles(told: Sequence[Told], state: State, waits: float | None) -> dict[str, Any]:
    """What holds a run up: `slow`, `stalls`, `suspect_nodes`, and `notes` about them for people."""
    events = [event for one in told for event in one.events]
    newest = told[-1].events if told and state.name in ACTIVE else ()
    slow: Mapping[str, Any] = next((one for one in reversed(newest) if one["event"] == "slow"), {})
    stalls = sorted({one.number for one in told for event in one.events if event["event"] == "stalled"})
    suspects = suspect_nodes(events)
    notes = [f"slow: {slow['reason']}"] if slow.get("ranks") else []
    if newest and waits is not None and waits >= DATA_BOUND:
        more = "raise data.workers and cluster.cpus_per_task, or move the shards to faster storage"
        notes.append(f"data-bound: {waits:.0%} of the last steps waited for data; {more}")
    if stalls:
        last = next(one for one in reversed(events) if one["event"] == "stalled")
        notes.append(f"stalled in {_numbered('attempt', stalls)}: {last.get('reason', '')}")
    for node, numbers in suspects.items():
        notes.append(f"suspect node {node}: slow or stalled in {_numbered('attempt', numbers)}")
    return {
        "slow": {name: slow.get(name, []) for name in ("ranks", "nodes")},
        "stalls": stalls,
        "suspect_nodes": suspects,
        "notes": notes,
    }


def _numbered(word: str, numbers: Sequence[int]) -> str:
    return f"{word}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _pace(lines: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Of an attempt's last lines: seconds a step, and the fraction of them that waited for data."""
    steps, seconds, waited = 0, 0.0, 0.0
    for before, line in pairwise(lines[-PACE_LINES:]):
        numbers = [one.get(name) for one in (before, line) for name in ("step", "samples")]
        rate, wait = line.get("samples_per_second"), line.get("data_wait_seconds")
        if not all(isinstance(number, (int, float)) for number in (*numbers, rate)) or not rate:
            continue
        if line["step"] > before["step"]:
            steps += line["step"] - before["step"]
            seconds += (line["samples"] - before["samples"]) / rate
            waited += wait if isinstance(wait, (int, float)) else 0.0
    if not steps or seconds <= 0:
        return None, None
    return seconds / steps, min(1.0, waited / seconds)


def _left(
    step: int | None, total: int | None, pace: float | None, accounts: Sequence[Account]
) -> float | None:
    """Seconds until the last step, evaluations and saves as so far."""
    if step is None or total is None or pace is None:
        return None
    spent = {kind: sum(one.spent[kind] for one in accounts) for kind in (*STEPS, "evaluate", "save")}
    stepping = sum(spent[kind] for kind in STEPS)
    more = (spent["evaluate"] + spent["save"]) / stepping if stepping else 0.0
    return max(0, total - step) * pace * (1 + more)


def _written(run: Run, checkpoint: int | None) -> float | None:
    """When the checkpoint of a step was complete; None without one, or where it has just been deleted."""
    if checkpoint is None:
        return None
    try:
        return os.stat(run.checkpoints / name_of(checkpoint) / MANIFEST).st_mtime
    except FileNotFoundError:
        return None
