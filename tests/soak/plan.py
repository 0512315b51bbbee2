"""What a soak does to its runs and when: pure functions of the seed and the seconds."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "submit",
    "submit again",
    "preempt",
    "kill a rank",
    "cancel",
    "scancel",
    "cancel for good",
    "kill a node",
    "lose a node",
    "restore",
]
OFTEN: dict[Kind, int] = {
    "preempt": 34,
    "kill a rank": 28,
    "cancel": 8,
    "scancel": 8,
    "kill a node": 6,
    "lose a node": 6,
    "submit again": 10,
}
"""How often each act comes, out of 100."""
RUNS, TORCH = 20, 5
"""How many runs there are; the first so many train with torch."""
CANCELLED, BROKEN = RUNS - 1, RUNS - 2
"""The run that is cancelled and not submitted again, and the one whose data is broken at a late step."""
EVERY_SECONDS = 8.0
"""Between two acts, on average."""
STEP_SECONDS = 0.2
"""Of a step of the runs without torch."""
SHAPES = ((1, 2), (1, 3), (2, 2), (2, 1), (1, 1))
"""Nodes, and ranks of each node, in turn."""


@dataclass(frozen=True)
class Case:
    """One of the runs: how it is started and how it has to end."""

    number: int
    torch: bool
    nodes: int
    tasks: int
    steps: int
    fate: Literal["finish", "cancel", "fail"] = "finish"

    @property
    def name(self) -> str:
        """The recipe's name."""
        return f"{'torch' if self.torch else 'plain'}-{self.number:02d}"

    @property
    def ranks(self) -> int:
        """On all nodes."""
        return self.nodes * self.tasks


@dataclass(frozen=True)
class Act:
    """`at`: seconds from the beginning. `run`: the first choice; where it does not fit, the next that does.

    `draw`, in [0, 1): which of its ranks or nodes.
    """

    at: float
    kind: Kind
    run: int
    draw: float = 0.0


def cases(seconds: float) -> list[Case]:
    """The runs. Undisturbed each takes about a quarter of the time, with torch where five share two cores."""
    found = []
    for number in range(RUNS):
        nodes, tasks = SHAPES[number % len(SHAPES)]
        torch = number < TORCH
        steps = max(200, int(seconds if torch else 0.25 * seconds / STEP_SECONDS))
        fate = {CANCELLED: "cancel", BROKEN: "fail"}.get(number, "finish")
        steps *= 10 if fate == "cancel" else 1  # it must not finish before
        found.append(Case(number, torch, nodes, max(2, tasks) if torch else tasks, steps, fate))
    return found


def acts(seed: int, seconds: float) -> list[Act]:
    """All acts, by time: the runs are submitted in the first fifth, and the last tenth has no new act."""
    draw = random.Random(seed).random
    found = [Act(0.2 * seconds * number / RUNS, "submit", number) for number in range(RUNS)]
    found.append(Act(0.5 * seconds, "cancel for good", CANCELLED))
    end, away = 0.9 * seconds, 0.0  # away: until then a node is missing
    at = 0.1 * seconds
    while (at := at - EVERY_SECONDS * math.log(1.0 - draw())) < end:
        act = Act(at, _kind(draw()), int(draw() * RUNS), draw())
        later = draw()
        if act.kind in ("kill a node", "lose a node"):
            if at < away:
                continue
            away = at + 5 + 55 * later  # SLURM notices after some 25 s: before it, and after it
            found.append(Act(min(away, end), "restore", act.run))
        if act.kind in ("cancel", "scancel"):
            found.append(Act(min(at + 2 + 20 * later, end), "submit again", act.run))
        found.append(act)
    return sorted(found, key=lambda act: act.at)


def _kind(draw: float) -> Kind:
    left = draw * sum(OFTEN.values())
    for kind, often in OFTEN.items():
        left -= often
        if left < 0:
            return kind
    raise AssertionError(f"{draw} is not below 1")
