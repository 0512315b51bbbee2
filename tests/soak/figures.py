"""What the runs of a soak lost and spent: from their accounts, and once more from what was recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from clipcluster.runs.attempts import Attempt
from clipcluster.runs.files import read_lines
from clipcluster.runs.folder import Run
from jobs.accounting import ALLOCATED, KINDS, Account, device_seconds, goodput
from jobs.endings import history
from jobs.state import Queue, state_of
from jobs.status import accounts_of

SHARE = 0.01
"""By how much the sum of all causes may differ from the allocated time."""


@dataclass(frozen=True)
class Story:
    """One run and its accounts. `allocated`: seconds from the first line of each attempt's batch script until
    its verdict, or the last that it recorded, read apart from the accounts."""

    run: Run
    accounts: Sequence[Account]
    allocated: float

    @property
    def caused(self) -> float:
        """The seconds of all causes."""
        return sum(account.spent[kind] for account in self.accounts for kind in ALLOCATED)


def story_of(run: Run, queue: Queue) -> Story:
    """The run with its accounts, once it has ended."""
    allocated = sum(_seconds(attempt) for attempt in run.attempts())
    return Story(run, accounts_of(run, state_of(run, queue)), allocated)


def _seconds(attempt: Attempt) -> float:
    claim = attempt.claim()
    verdict = history.last_verdict(attempt)
    ended = verdict["time"] if verdict else max(_times(attempt), default=claim["time"])
    return ended - (claim.get("began") or claim["time"])


def _times(attempt: Attempt) -> Iterator[float]:
    for path in [*attempt.path.glob("events-*.jsonl"), *attempt.path.glob("metrics.jsonl")]:
        yield from (line["time"] for line in read_lines(path))


@dataclass(frozen=True)
class Return:
    """From a requeue to the next attempt's first step: seconds in the queue, and from its start on."""

    waited: float
    started: float


def returns(run: Run) -> list[Return]:
    """Of every attempt that was requeued and whose next one logged a step."""
    found = []
    for before, after in pairwise(run.attempts()):
        verdict = history.last_verdict(before)
        claim, first = after.claim(), read_lines(after.path / "metrics.jsonl")[:1]
        if verdict and verdict["event"] in ("requeue", "note") and before.job == after.job and first:
            began = claim.get("began") or claim["time"]
            found.append(Return(began - verdict["time"], first[0]["time"] - began))
    return found


def leavings(run: Run) -> list[float]:
    """Of every attempt that was preempted and stopped: seconds from the saved checkpoint to the verdict."""
    found = []
    for attempt in run.attempts():
        outcome, verdict = attempt.outcome(), history.last_verdict(attempt)
        if outcome and outcome["outcome"] == "stopped" and verdict and verdict["ending"] == "preempted":
            found.append(verdict["time"] - outcome["time"])
    return found


def problems(stories: Iterable[Story]) -> list[str]:
    """What the figures themselves show to be wrong."""
    found = []
    for story in stories:
        if abs(story.caused - story.allocated) > SHARE * story.allocated:
            found.append(
                f"{story.run.name}: the causes sum up to {story.caused:.1f} s, allocated were "
                f"{story.allocated:.1f} s"
            )
        for account in story.accounts:
            outcome = story.run.attempt(account.number).outcome()
            if outcome and outcome["outcome"] == "stopped" and account.lost_steps:
                found.append(
                    f"{story.run.name}: attempt {account.number} stopped and saved, and "
                    f"{account.lost_steps} of its steps were lost"
                )
    return found


def table(stories: Sequence[Story], held: float, evicted: Sequence[float]) -> list[str]:
    """The figures, a line each."""
    accounts = [(account, _ended_as(story, account)) for story in stories for account in story.accounts]
    lines = [f"{'attempts ended as':<24}{'attempts':>9}{'steps lost':>12}{'seconds lost':>14}"]
    by_ending: Counter[str] = Counter(ended for _, ended in accounts)
    for ending, count in [*by_ending.most_common(), ("all", len(accounts))]:
        own = [account for account, ended in accounts if ending in (ended, "all")]
        steps, seconds = sum(one.lost_steps for one in own), sum(one.spent["lost"] for one in own)
        lines.append(f"  {ending:<22}{count:>9}{steps:>12,}{seconds:>14,.1f}")
    back = [one for story in stories for one in returns(story.run)]
    lines.append("seconds, median and largest")
    lines.append(_spread("from requeue to start (SLURM)", [one.waited for one in back]))
    lines.append(_spread("from start to next step", [one.started for one in back]))
    lines.append(_spread("from requeue to next step", [one.waited + one.started for one in back]))
    lines.append(_spread("from preemption to free nodes", evicted))
    leaving = [seconds for story in stories for seconds in leavings(story.run)]
    lines.append(_spread("of that, from saved to requeued", leaving))
    spent = Counter[str]()
    for story in stories:
        spent.update(device_seconds(story.accounts))
    total = sum(spent[kind] for kind in ALLOCATED)
    lines.append(f"goodput {goodput(spent) or 0:.1%} of {total:,.0f} allocated rank-seconds")
    lines += [
        f"  {KINDS[kind]:<32}{spent[kind]:>12,.0f}{spent[kind] / total:>8.1%}" for kind in ALLOCATED if total
    ]
    allocated, caused = sum(story.allocated for story in stories), sum(story.caused for story in stories)
    lines.append(
        f"allocated {allocated:,.1f} s by first and last record, {caused:,.1f} s by the sum of all causes "
        f"({abs(caused - allocated) / allocated if allocated else 0:.2%} apart); squeue showed {held:,.0f} s"
    )
    return lines


def _ended_as(story: Story, account: Account) -> str:
    """The verdict's word; apart, the preempted that could not save: still starting, say, or killed."""
    ended = account.ending or "without a verdict"
    outcome = story.run.attempt(account.number).outcome()
    saved = outcome is not None and outcome["outcome"] == "stopped"
    return "preempted, unsaved" if ended == "preempted" and not saved else ended


def _spread(what: str, seconds: Sequence[float]) -> str:
    if not seconds:
        return f"  {what:<32}{'none':>9}"
    return f"  {what:<32}{median(seconds):>9.1f}{max(seconds):>9.1f}   of {len(seconds)}"
