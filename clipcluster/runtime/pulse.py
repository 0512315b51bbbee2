"""Signs of life of a rank: the training gives them, a watchdog in another thread reads them. No torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

BATCH, FEATURES, GRADIENTS, BETWEEN = (
    "waiting for a batch",
    "computing features",
    "computing loss and gradients",
    "between two steps",
)
STEP = (BATCH, FEATURES, GRADIENTS, BETWEEN)
"""What a rank does in a step, in this order. From the gradients on it needs the other ranks."""
OTHERS = "waiting for the other ranks"
KNOWN = 5  # steps from which a median means something


class Pulse:
    """What this rank is doing, and how often it made progress. Giving a sign costs no more than an addition.

    beats: signs so far; one that waits gives none. step_seconds: how long each of the last steps took, from
    the wait for its batch on; empty again where steps of another length begin.

    Args:
        queues: steps are queued on a device: how far this process is says little of how far the device is.
    """

    def __init__(self, *, queues: bool = False) -> None:
        self.beats = 0
        self.doing = "starting"
        self.waits_for_others = False
        self._queues = queues
        self._began = 0.0
        self.step_seconds: deque[float] = deque(maxlen=101)

    def fetch(self) -> None:
        """A step begins: this rank waits for its batch."""
        self._began = time.monotonic()
        self.begin(BATCH)

    def beat(self) -> None:
        """This rank made progress."""
        self.beats += 1

    def begin(self, doing: str) -> None:
        """This rank made progress, and now begins something else."""
        self.doing = doing
        self.beats += 1

    def restart(self, doing: str) -> None:
        """The same where the steps that follow may take another time than those before."""
        self.step_seconds.clear()
        self.begin(doing)

    def stepped(self) -> None:
        """A step that began with the wait for its batch is done."""
        self.step_seconds.append(time.monotonic() - self._began)
        self.begin(BETWEEN)

    @contextmanager
    def with_others(self, *, waits: bool = True, counts: bool = True) -> Iterator[None]:
        """What ends once all ranks are there; `waits`: this rank does nothing else meanwhile.

        counts: its end is a sign of life.
        """
        self.waits_for_others = waits
        try:
            yield
        finally:
            self.waits_for_others = False
        if counts:
            self.beats += 1

    @property
    def median_seconds(self) -> float | None:
        """The median of the last steps; None before there are `KNOWN`."""
        seconds = tuple(self.step_seconds)
        return median(seconds) if len(seconds) >= KNOWN else None

    @property
    def long_seconds(self) -> float:
        """Nine in ten of the last steps took no longer: not those that compiled. 0.0 before the first."""
        seconds = sorted(self.step_seconds)
        return seconds[(len(seconds) - 1) * 9 // 10] if seconds else 0.0

    @property
    def state(self) -> str:
        """What this rank is doing, in words."""
        return f"{OTHERS}, {self.doing}" if self.waits_for_others else self.doing

    @property
    def place(self) -> int:
        """How far this rank is within its step: it holds up those with a larger one.

        Where steps are queued, a rank whose device is stuck and one whose device waits for it look alike.
        """
        if self._queues and self.doing in STEP:
            return min(1, STEP.index(self.doing))
        if self.waits_for_others:
            return len(STEP)
        return STEP.index(self.doing) if self.doing in STEP else 1
