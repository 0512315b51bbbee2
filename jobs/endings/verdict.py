"""Which ending was this, and what follows: a pure function of what the batch side sees.

An ending is decided on the batch side, never by a rank: only that side outlives a crash, and only the batch
side sees what SLURM thinks of the job. The first line of the table in `decide` that fits is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from clipcluster.runtime.outcome import ADVICE, Outcome
from tools.slurm import expand_nodes

Action = Literal["leave", "finish", "cancel", "stop", "note", "requeue", "fail"]
FRUITLESS = 3  # endings in a row without a newer checkpoint that end a run
REPEATED = 1  # exit code of a run that such a row ended
MORE_MEMORY = (
    "Ask for more memory on each node (cluster.mem), or use fewer loader workers (data.workers), then submit "
    "again: the run resumes from its last checkpoint."
)


@dataclass(frozen=True)
class Job:
    """What the scheduler says of the job now."""

    running: bool
    time_limit: bool = False  # not running because its time is over
    restarts: int = 0
    preempted: bool = False  # it runs still, with a time at which it will be evicted


@dataclass(frozen=True)
class Facts:
    """Everything the verdict rests on, gathered once."""

    code: int  # of srun, or the largest of the local ranks'
    superseded: bool = False  # a later attempt owns the run
    said: Mapping[str, Any] | None = None  # outcome.json
    cancelled: bool = False  # marks/cancelled names this job
    told: str = ""  # of a local run alone: the signal that was sent to it
    job: Job | None = None  # None: the scheduler gave no answer
    restart_count: int = 0  # restarts when this attempt began
    time_nearly_over: bool = False  # within the lead time before the limit
    started: bool = False  # some rank wrote `start`
    # what ranks raised unexpectedly: `step` (None before the first), and as `signature` type and message,
    # without what differs from one attempt to the next
    raised: Sequence[Mapping[str, Any]] = ()
    raised_before: Sequence[Mapping[str, Any]] = ()  # just before, with no newer checkpoint since
    stalled: Mapping[str, Any] | None = None  # their event: `reason`, `silent`, `nodes` where some are behind
    checkpoint: int | None = None  # the step of the newest complete one
    fruitless: int = 0  # endings in a row just before this one that count, with no newer checkpoint since
    broken_before: bool = False  # the ending just before was "never started"
    errors: Sequence[str] = ()  # lines of srun about tasks and nodes
    memory: str = ""  # the line in which SLURM says that ranks were killed because they exceeded their memory
    tail: str = ""  # the last lines of srun and the ranks


@dataclass(frozen=True)
class Verdict:
    """What follows. `code` is the batch script's exit code; `counts`: a row of these ends the run."""

    action: Action
    ending: str  # which line of the table, such as "out of time"
    code: int
    reason: str = ""
    advice: str = ""
    counts: bool = False
    mark: bool = False  # bind the job in marks/cancelled


def decide(facts: Facts) -> Verdict:
    """The first line that fits; see the table in the documentation."""
    if facts.superseded:
        return Verdict("leave", "superseded", Outcome.STALE)
    if facts.said and facts.said["outcome"] == "finished":
        return Verdict("finish", "finished", Outcome.FINISHED)
    if facts.cancelled:
        return Verdict("cancel", "cancelled", Outcome.CANCELLED, "cancelled with clipcluster cancel")
    if facts.told:
        return Verdict("stop", "told to stop", Outcome.STOPPED, f"told to stop by {facts.told}")
    return _by_scheduler(facts) or _by_ranks(facts)


def _by_scheduler(facts: Facts) -> Verdict | None:
    """The lines that rest on what the scheduler says; None where none fits, or it says nothing."""
    job = facts.job
    if job is None:
        return None
    if job.restarts > facts.restart_count:
        return Verdict("note", "requeued already", Outcome.STOPPED, "the scheduler requeued the job itself")
    if not job.running and job.time_limit:
        return _unless_fruitless(facts, _requeue("out of time", "the time limit ended the attempt"))
    if not job.running:
        return Verdict(
            "cancel", "cancelled", Outcome.CANCELLED, "cancelled with scancel or by the site", mark=True
        )
    if job.preempted:
        return Verdict("requeue", "preempted", Outcome.STOPPED, "preempted")
    return None


def _by_ranks(facts: Facts) -> Verdict:
    said = facts.said
    if said and said["outcome"] == "stopped":
        verdict = Verdict("requeue", "stopped", Outcome.STOPPED, said["reason"] or "asked to stop")
        if facts.time_nearly_over:
            return _unless_fruitless(facts, replace(verdict, counts=True))
        return verdict
    if said:
        reason = f"{said['reason']} (rank {said['rank']} on {said['host']})"
        return Verdict("fail", "failed", said["code"], reason, said["advice"] or ADVICE.get(said["code"], ""))
    if facts.memory:
        return Verdict("fail", "out of memory", Outcome.OUT_OF_MEMORY, facts.memory, MORE_MEMORY)
    again = next((each for each in facts.raised if each in facts.raised_before), None)
    if again is not None:
        where = "before the first step" if again["step"] is None else f"at step {again['step']}"
        reason = f"{again['signature']} ({where}, twice in a row)"
        return Verdict("fail", "failed", Outcome.ERROR, reason, ADVICE[Outcome.ERROR])
    if facts.stalled:
        return _unless_fruitless(facts, _requeue("stalled", str(facts.stalled.get("reason", ""))))
    if facts.started:
        reason = "; ".join(facts.errors[:3]) or (
            f"a rank or a node ended without recording an outcome (code {facts.code})"
        )
        return _unless_fruitless(facts, _requeue("crashed", reason))
    reason = f"no rank started (code {facts.code}):\n{facts.tail}".rstrip(":\n")
    if facts.broken_before:
        advice = "Fix the environment (cluster.setup, the Python of the submission), then submit again."
        return Verdict("fail", "never started", REPEATED, reason, advice)
    return _unless_fruitless(facts, _requeue("never started", reason))


def _requeue(ending: str, reason: str) -> Verdict:
    return Verdict("requeue", ending, Outcome.STOPPED, reason, counts=True)


def _unless_fruitless(facts: Facts, verdict: Verdict) -> Verdict:
    if facts.fruitless + 1 < FRUITLESS:
        return verdict
    reason = f"{FRUITLESS} endings in a row with no newer checkpoint; the last: {verdict.ending}"
    advice = (
        "See clipcluster logs RUN; save more often (checkpoint.every) or ask for more time, submit again."
    )
    first = _first_culprit(facts.errors)
    if first and first.string.endswith(": Killed"):
        advice = f"The kernel kills ranks where a node runs out of memory. {MORE_MEMORY}"
    return Verdict(
        "fail",
        verdict.ending,
        REPEATED,
        f"{reason} ({verdict.reason})" if verdict.reason else reason,
        advice,
    )


# "srun: error: n2: task 1: Killed", "srun: error: n[2-3]: tasks 0-3: …", "srun: error: Node failure on n3"
_OF_TASKS = re.compile(r"srun: error: ([A-Za-z0-9.,\[\]_-]+): tasks? [0-9,\-]+: (.*)")
_OF_NODE = re.compile(r"srun: error: Node failure on ([A-Za-z0-9.,\[\]_-]+)")
_SURVIVORS = (Outcome.STOPPED, Outcome.LOST_PEERS, Outcome.STALLED)
_SURVIVOR = re.compile(rf"exit code ({'|'.join(str(int(code)) for code in _SURVIVORS)})\b")
_STALLED = re.compile(rf"exit code {Outcome.STALLED:d}\b")

# "slurmstepd: error: Detected 1 oom_kill event in StepId=3.0. …", "srun: error: n2: task 1: Out Of Memory",
# "slurmstepd-n2: error: StepId=3.0 exceeded memory limit (7 > 5), being killed"
_OF_MEMORY = re.compile(
    r"^\s*((?:srun|slurmstepd)[^\s:]*: .*"
    r"(?:oom[-_]kill event|exceeded (?:job |virtual )?memory limit|: out of memory).*)",
    re.IGNORECASE | re.MULTILINE,
)


def error_lines(text: str) -> list[str]:
    """The lines in which srun tells of tasks and nodes that went wrong."""
    return [line.strip() for line in text.splitlines() if _OF_TASKS.search(line) or _OF_NODE.search(line)]


def memory_line(text: str) -> str:
    """The first line in which SLURM says that tasks were killed for their memory; "" where none does."""
    found = _OF_MEMORY.search(text)
    return found[1].strip() if found else ""


def blamed(
    errors: Sequence[str], down: Sequence[str], stalled: Mapping[str, Any] | None = None
) -> str | None:
    """The node a crash is blamed on: one that the scheduler calls down, else the first in srun's errors.

    Ranks that stopped, stalled or lost their peers are survivors and blame no node. Of a list of nodes the
    first. A stall (the event `stalled`) is blamed on the one node whose ranks gave no sign of life: one that
    waits for a disk may wait for one that all nodes use. Ranks that srun killed once others had stalled blame
    no node either.
    """
    if down:
        return down[0]
    if stalled:
        nodes = stalled.get("nodes", []) if stalled.get("silent") else []
        return nodes[0] if len(nodes) == 1 else None
    first = _first_culprit(errors)
    return next(iter(expand_nodes(first[1])), None) if first else None


def _first_culprit(errors: Sequence[str]) -> re.Match[str] | None:
    """The first of the error lines that tells of no survivor; its group is the nodes."""
    after_a_stall = any(_STALLED.search(line) for line in errors)
    matches = (
        _OF_NODE.search(line) or (None if after_a_stall else _OF_TASKS.search(line)) for line in errors
    )
    return next((match for match in matches if match and not _SURVIVOR.search(match.string)), None)
