"""A trainee whose import takes a second, as torch's does."""

import time

from clipcluster.runtime.outcome import Outcome

_end = time.monotonic() + 1
while time.monotonic() < _end:
    time.sleep(0.01)


def train(run, attempt, launch, stop):
    return Outcome.STOPPED if stop.requested else Outcome.FINISHED
