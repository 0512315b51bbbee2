"""How long each rank works in a step before it needs the others, and which ranks are slow.

From the first collective of a step on all ranks take equally long: the fast ones wait for the slow one. What
a rank does before is its own: it waits for its batch and computes features. On an accelerator events are put
among the queued work, and read at log steps, which wait for the device anyway: a wait for a batch counts as
far as the device waits too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from statistics import median_low

import torch

from clipcluster.runtime.pulse import FEATURES, GRADIENTS, Pulse

logger = logging.getLogger("clipcluster")
SLOW = 1.3
"""A rank is slow whose own part of a step takes so many times the median of all ranks, …"""
RELEVANT = 0.1
"""… and holds up every step by this fraction of it, …"""
LINES, SECONDS = 3, 30.0
"""… in so many lines of metrics one after the other, and for so long."""


class Work:
    """The stopwatch of one rank. Every step calls `fetch`, `fetched`, and `end` once or more.

    compares: what it measures is this rank's own; False on a device that does not say how long its work took.
    """

    def __init__(self, device: torch.device, pulse: Pulse) -> None:
        self._device, self._pulse = device, pulse
        self._by_events = device.type != "cpu" and _keeps_time(device)
        self.compares = device.type == "cpu" or self._by_events
        self.restart()

    def restart(self) -> None:
        """Forget what was measured, a step that has begun too."""
        self._waited = self._computed = 0.0
        self._began = self._ended = 0.0
        self._events: list[list[torch.Event]] = []  # of each step: asked for a batch, had it, had features

    def fetch(self) -> None:
        """A step begins with the wait for its batch."""
        self._pulse.fetch()
        self._asked = time.perf_counter()
        if self._by_events:
            self._events.append([self._mark()])

    def fetched(self) -> None:
        """The batch is there; features follow."""
        self._pulse.begin(FEATURES)
        self._settle()
        self._began = self._ended = time.perf_counter()
        self._waited += self._began - self._asked
        if self._events:
            self._events[-1].append(self._mark())

    def end(self) -> None:
        """Features are computed, or queued on the device; what follows may need the other ranks."""
        self._pulse.begin(GRADIENTS)
        self._ended = time.perf_counter() if self._began else 0.0  # not where it was restarted in between
        if self._events:
            self._events[-1][2:] = [self._mark()]

    def _mark(self) -> torch.Event:
        mark = torch.Event(self._device, enable_timing=True)
        mark.record()
        return mark

    def _settle(self) -> None:
        """Count the step before."""
        self._computed += self._ended - self._began
        self._began = self._ended

    def take(self) -> tuple[float, float]:
        """Seconds since `restart` of waiting for batches, and of computing features.

        On an accelerator the caller has waited for the device.
        """
        if not self._by_events:
            self._settle()
            return self._waited, self._computed
        steps = [step for step in self._events if len(step) == 3]
        waited = sum(asked.elapsed_time(had) for asked, had, _ in steps)
        return waited / 1000, sum(had.elapsed_time(end) for _, had, end in steps) / 1000


def _keeps_time(device: torch.device) -> bool:
    """Whether events of a device have times; not every backend of torch implements that."""
    try:
        begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        begin.record()
        end.record()
        end.synchronize()
        begin.elapsed_time(end)
    except RuntimeError as error:
        logger.warning("slow ranks are not looked for: %s events have no times (%s)", device.type, error)
        return False
    return True


def slow_ranks(own: Sequence[float], wall: float) -> list[int]:
    """The ranks that hold up the others; `own` seconds by rank, in `wall` seconds of training."""
    usual = median_low(own)
    return [
        rank
        for rank, seconds in enumerate(own)
        if seconds >= SLOW * usual and seconds - usual >= RELEVANT * wall
    ]


class Slowness:
    """Which ranks are slow for longer than a moment."""

    def __init__(self) -> None:
        self.ranks: list[int] = []
        self._seen: list[int] = []
        self._lines, self._seconds = 0, 0.0

    def changed(self, found: list[int], seconds: float) -> bool:
        """Add the slow ranks of so many seconds, a line of metrics; whether `ranks` is other than before."""
        if found != self._seen:
            self._seen, self._lines, self._seconds = found, 0, 0.0
        self._lines, self._seconds = self._lines + 1, self._seconds + seconds
        if self._lines < LINES or self._seconds < SECONDS or found == self.ranks:
            return False
        self.ranks = found
        return True
