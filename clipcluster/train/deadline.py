"""How much time an attempt has: until the kill that follows a signal, and until the job's time limit."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping

from clipcluster.runtime.environment import EARLY_SECONDS, ENDS, GRACE, LEAD
from clipcluster.runtime.stop import GRACE_SECONDS, MARGIN_SECONDS, Stop


class Deadline:
    """The time of one attempt.

    Args:
        grace: seconds from the signal of a preemption to the kill.
        ends: the job's time limit, in seconds since 1970; None where there is none. It is looked at once: a
            clock that is set, or a laptop that sleeps, changes nothing afterwards.
        lead: seconds before it at which the scheduler sends USR1.
    """

    def __init__(self, grace: float = GRACE_SECONDS, ends: float | None = None, lead: float = 0.0) -> None:
        left = math.inf if ends is None else ends - time.time()
        if left <= 0:  # no limit that one could keep
            left = math.inf
        self.grace, self.lead = grace, lead
        self._ends, self._most = time.monotonic() + left, left / 3

    @classmethod
    def of_environment(cls, grace: float | None, environ: Mapping[str, str] | None = None) -> Deadline:
        """What the batch script or the local supervisor says; else `grace`, where the recipe has it."""
        environ = os.environ if environ is None else environ
        given = environ.get(GRACE) or grace or GRACE_SECONDS
        ends = environ.get(ENDS)
        return cls(float(given), float(ends) if ends else None, float(environ.get(LEAD) or 0))

    @property
    def left(self) -> float:
        """Seconds until the time limit; infinite where there is none."""
        return self._ends - time.monotonic()

    def by_clock(self, stop: Stop) -> bool:
        """Whether it was rank 0's clock that asked to stop, not a signal."""
        return self.left < math.inf and stop.requested and stop.signal is None

    def near(self, needed: float) -> bool:
        """Whether a stop that takes `needed` seconds has to begin now to end before the time limit.

        It begins in the last third of the attempt's time at the earliest.
        """
        return self.left <= min(needed + MARGIN_SECONDS, self._most)

    def seconds_left(self, stop: Stop) -> float:
        """Seconds until the kill, after a request to stop.

        A site may send USR1 for a preemption too: it is that of the time limit only close to it.
        """
        ago = time.time() - stop.time if stop.time else 0.0
        at_limit = stop.signal == "SIGUSR1" and self.left + ago <= self.lead + EARLY_SECONDS
        if self.by_clock(stop) or at_limit:
            return self.left
        return min(self.left, self.grace - ago)
