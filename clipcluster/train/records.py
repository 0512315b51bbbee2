"""What a rank records between two boundaries, and the failure it found until all ranks can act on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clipcluster.errors import StaleAttempt
from clipcluster.runs.attempts import Attempt
from clipcluster.runtime.outcome import Failure
from clipcluster.runtime.world import World

logger = logging.getLogger("clipcluster")


class Records:
    """The records of one rank. `failure` is what it found since the last boundary, None as a rule."""

    def __init__(self, attempt: Attempt, world: World) -> None:
        self._attempt, self._world = attempt, world
        self.failure: Exception | None = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep a failure of what is done inside for the next boundary, where all ranks raise it together.

        A record that cannot be written (a full disk) is logged and does not end the run; a checkpoint that
        cannot be written does, by the saver's count.
        """
        try:
            yield
        except (Failure, StaleAttempt) as error:
            self.failure = error
        except OSError as error:
            logger.warning("a record of step %s was not written: %s", self._attempt.step, error)

    def event(self, kind: str, **fields: Any) -> None:
        """An event of rank 0; the other ranks write nothing."""
        if self._world.is_main:
            self.own_event(kind, **fields)

    def own_event(self, kind: str, **fields: Any) -> None:
        """An event of this rank."""
        with self.keeping():
            self._attempt.event(kind, writer=f"rank-{self._world.rank}", **fields)

    def samples(self, step: int, keys: list[tuple[int, str, str]]) -> None:
        """The samples (slot, shard, key) that a step consumed."""
        with self.keeping():
            lines = [{"step": step, "slot": slot, "shard": shard, "key": key} for slot, shard, key in keys]
            self._attempt.samples(self._world.rank, lines)
