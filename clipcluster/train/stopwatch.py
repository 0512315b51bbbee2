"""Where the seconds of an attempt go once it trains. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_SECONDS = 300.0
"""A running attempt records its seconds at least so often (at its log steps)."""


class Stopwatch:
    """Seconds by kind since `begin`: what is measured inside `on`, and as `train` all the rest."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Start from zero."""
        self._began, self._seconds = time.monotonic(), dict[str, float]()
        self._read = float("-inf")

    @contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """Count the time inside as `kind`; not to be nested."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[kind] = self._seconds.get(kind, 0.0) + time.monotonic() - began

    def add(self, kind: str, seconds: float) -> None:
        """Count so many seconds since `begin`, which nothing else counted, as `kind`."""
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    @property
    def due(self) -> bool:
        """Whether EVERY_SECONDS have passed since the last reading, or there was none."""
        return time.monotonic() - self._read >= EVERY_SECONDS

    def read(self) -> dict[str, float]:
        """Seconds by kind; their sum is the time since `begin`."""
        self._read = time.monotonic()
        rest = self._read - self._began - sum(self._seconds.values())
        return {kind: round(seconds, 3) for kind, seconds in {**self._seconds, "train": rest}.items()}
