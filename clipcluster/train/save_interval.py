"""How often `checkpoint.every: auto` saves: by what a save costs the training, and how often work is lost.

A preemption or a time limit that lets the ranks save loses nothing and does not count.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from clipcluster.runs.interruptions import Interruptions
from clipcluster.runtime.pulse import Pulse

FIRST_SECONDS = 900.0
"""Between two saves until the cost of one was measured."""
LEAST_SECONDS = 60.0
"""Between two saves at least, however cheap they are: a shared disk serves others too."""
ASSUMED_SECONDS = 86400.0
"""Between two endings that lose work, as assumed of a run that nothing is known of."""
COSTS = 5  # saves whose median cost counts: one may have met a slow disk


def best_interval(cost: float, between: float) -> float:
    """Seconds of training between two saves that make the run end soonest.

    Args:
        cost: seconds by which a save delays the training.
        between: mean seconds from one ending that loses work to the next; more than zero.

    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future
    Generation Computer Systems 22 (2006), equation 37. Its first factor, which it tends to for cheap saves,
    is that of J. W. Young, A first order approximation to the optimum checkpoint interval, Communications of
    the ACM 17 (1974).
    """
    if cost >= 2 * between:
        return between
    ratio = cost / (2 * between)
    return math.sqrt(2 * cost * between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def seconds_between(trained: float, count: int) -> float:
    """Mean seconds between `count` endings that lost work, seen in `trained` seconds of training.

    The inverse of the mean rate after that, of a gamma distribution that before it was as wide as one such
    ending in ASSUMED_SECONDS: the run's own history counts the more the longer it is.
    """
    return (trained + ASSUMED_SECONDS) / (count + 1)


class SaveInterval:
    """The time between two saves of `checkpoint.every: auto`, from the history of the run and this attempt.

    Rank 0 alone asks for it: the ranks agree on every save at a step boundary, as on one by the clock.
    """

    def __init__(self, history: Interruptions) -> None:
        self._history, self._began = history, time.monotonic()
        self._costs = deque(history.save_costs, maxlen=COSTS)

    def saved(self, cost: float) -> None:
        """Count a save that delayed the training by `cost` seconds."""
        self._costs.append(cost)

    @property
    def seconds(self) -> float:
        """From the beginning of one save to the beginning of the next."""
        if not self._costs:
            return FIRST_SECONDS
        cost = median(self._costs)
        trained = self._history.trained_seconds + time.monotonic() - self._began
        between = seconds_between(trained, self._history.count)
        return max(LEAST_SECONDS, best_interval(cost, between) + cost)


class SaveCost:
    """Seconds by which saves in the background delay the training, measured on one rank.

    It waits while a copy is taken and old checkpoints are removed, and its steps may be slower while the
    files are written: they are compared with the median of the last steps.
    """

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._began = False
        self._waited = self._slower = 0.0
        self._usual: float | None = None
        self._step = -1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The training waits meanwhile."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - began

    def begin(self) -> None:
        """From here on the files are written."""
        self._began, self._usual = True, self._pulse.median_seconds

    def beside(self, step: int) -> None:
        """At a boundary: the step before it was made while the files were written."""
        if self._usual is not None and step != self._step and self._pulse.step_seconds:
            self._slower += self._pulse.step_seconds[-1] - self._usual
        self._step = step

    def take(self) -> float | None:
        """What was measured since the last call; None where no save began in the background since."""
        if not self._began:
            return None
        cost = self._waited + max(0.0, self._slower)
        self._began, self._waited, self._slower = False, 0.0, 0.0
        return cost
