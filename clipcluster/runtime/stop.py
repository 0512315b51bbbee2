"""Being asked to stop: the signals of a rank, and what it wishes for. Standard library only.

The handlers set a flag and do nothing else, and may be installed before torch is imported: a signal that
arrives during the imports would otherwise kill the process.
"""

from __future__ import annotations

import signal
import time
from enum import IntFlag
from types import FrameType

GRACE_SECONDS = 30
"""From the request to stop to the kill, where neither the recipe nor the scheduler says."""
MARGIN_SECONDS = 10.0
"""Between the last save and the time limit, for the ranks to leave and the verdict to be recorded."""


class Wish(IntFlag):
    """What a rank asks of all ranks at a step boundary; the ranks reduce it with a bitwise OR."""

    NONE = 0
    STOP = 1
    SAVE = 2
    ABORT = 4


class Stop:
    """The flag that a signal or a caller sets, read at step boundaries."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self.reason: str | None = None
        self.time: float | None = None

    def install(self, *, interactive: bool) -> None:
        """Let TERM, USR1 and USR2 set the flag, and INT too when `interactive` (outside SLURM).

        Only the main thread may call this. A signal that was ignored or blocked before, as a parent may hand
        it down, is handled from now on.
        """
        names = ["SIGTERM", "SIGUSR1", "SIGUSR2"]
        if interactive:
            names.append("SIGINT")
        numbers = [getattr(signal, name) for name in names]
        for number in numbers:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number).name
        self.request(self.signal)

    def request(self, reason: str) -> None:
        """Set the flag without a signal, for example when the recipe's own time is up."""
        if self.time is None:
            self.time = time.time()
        if self.reason is None:
            self.reason = reason

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def wishes(self) -> Wish:
        """`Wish.STOP` once asked to stop, else `Wish.NONE`."""
        return Wish.STOP if self.requested else Wish.NONE


_HOLD = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def holding_signals(python: str) -> list[str]:
    """A command to put before Python's arguments: signals that ask to stop wait for `Stop.install`.

    Before its handlers are installed, a rank would be killed by them. What remains is the start of a bare
    interpreter, some hundredths of a second; a rank killed then never started, and the job is requeued.
    """
    return [python, "-I", "-S", "-c", "; ".join(_HOLD.strip().splitlines())]


def ignore_signals() -> None:
    """Keep a loader worker alive through the signals that stop its rank; the rank ends its workers."""
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
