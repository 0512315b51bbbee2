"""The attempts of a run as the page shows them: the account of their time, and what else is told of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipcluster.runs.attempts import Attempt
from clipcluster.runs.columns import Columns
from jobs.accounting import Account

SHORT = {
    "queue": "queue",
    "requeue": "requeue",
    "train": "training",
    "start": "start",
    "rehearsal": "rehearsal",
    "data": "data",
    "evaluate": "evaluation",
    "save": "saves",
    "stalled": "stalled",
    "lost": "lost",
    "end": "ending",
}
"""The kinds of time as heads of columns."""
PREEMPTED = "preempted"


@dataclass(frozen=True, kw_only=True)
class AttemptSummary(Account):
    """One attempt. saves: seconds that each checkpoint took, written beside the training.

    skipped_steps: those that were not finite. happened: its roll-backs, stalls and failed saves.
    """

    host: str
    devices: tuple[str, ...]
    code: str
    saves: tuple[float, ...]
    skipped_steps: int
    happened: Sequence[Mapping[str, Any]]


def summary(
    account: Account, attempt: Attempt, events: Sequence[Mapping[str, Any]], logged: Columns, *, now: str = ""
) -> AttemptSummary:
    """One attempt, with the events of all ranks, and what it logged. now: what it does, where it may run."""
    own = [event for event in events if event["attempt"] == attempt.number]
    ending = account.ending or now or "ended without recording an outcome"
    return AttemptSummary(
        **{**vars(account), "ending": ending},
        host=str(attempt.claim().get("host") or ""),
        devices=tuple(str(event.get("device")) for event in own if event["event"] == "device"),
        code=str(attempt.settings().get("code") or ""),
        saves=tuple(_seconds(own, "checkpoint")),
        skipped_steps=int(np.nanmax(logged.get("skipped_steps", np.zeros(1)), initial=0)),
        happened=[one for one in own if one["event"] in ("roll_back", "stalled", "checkpoint_failed")],
    )


def _seconds(events: Sequence[Mapping[str, Any]], kind: str) -> list[float]:
    """How long each of these events says that it took."""
    found = (event.get("seconds") for event in events if event["event"] == kind)
    return [seconds for seconds in found if isinstance(seconds, (int, float))]
