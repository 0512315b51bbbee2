"""What a rank records between two step boundaries, and a failure that it keeps until all ranks can act."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from clipcluster.errors import StaleAttempt
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import bad_samples
from clipcluster.runtime.outcome import DataError, Failure
from clipcluster.runtime.stop import Wish
from clipcluster.runtime.world import World

LEAST_SAMPLES = 1000
"""The limit of bad samples is a fraction of at least this many, so that one does not end a small run."""
logger = logging.getLogger("clipcluster")


class Records:
    """The records of one rank. `failure` is what it found since the last boundary, usually None.

    Args:
        samples: the number of samples of all sources.
        limit: the fraction of them that may be bad.
    """

    def __init__(self, attempt: Attempt, world: World, *, samples: int, limit: float) -> None:
        self.attempt, self.world = attempt, world
        self.failure: Exception | None = None
        self._samples, self._limit = max(LEAST_SAMPLES, samples), limit
        self._known: set[tuple[str, str]] = set()
        self._new = 0

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep a failure that is raised inside for the next boundary, where all ranks raise it together.

        A record that cannot be written (a full disk) is logged and does not end the run; checkpoints that
        cannot be written do (see `Saver`).
        """
        try:
            yield
        except (Failure, StaleAttempt) as error:
            self.failure = error
        except OSError as error:
            logger.warning("not recorded at step %s: %s", self.attempt.step, error)

    def wishes(self) -> Wish:
        """ABORT once there is a failure."""
        return Wish.ABORT if self.failure else Wish.NONE

    def event(self, kind: str, **fields: Any) -> None:
        """Record an event on rank 0; the other ranks write nothing."""
        if self.world.is_main:
            self.own_event(kind, **fields)

    def own_event(self, kind: str, **fields: Any) -> None:
        """Record an event of this rank."""
        with self.keeping():
            self.attempt.event(kind, writer=f"rank-{self.world.rank}", **fields)

    def samples(self, step: int, keys: Iterable[tuple[int, str, str]]) -> None:
        """Record the samples (slot, shard, key) that a step consumed."""
        with self.keeping():
            lines = [{"step": step, "slot": slot, "shard": shard, "key": key} for slot, shard, key in keys]
            self.attempt.samples(self.world.rank, lines)

    def bad_samples(self, bad: Iterable[Mapping[str, Any]]) -> None:
        """Record samples that could not be decoded (`shard`, `key`, `reason`), each once per attempt."""
        for sample in bad:
            identity = (str(sample["shard"]), str(sample["key"]))
            if identity not in self._known:
                self._new += 1
                line = {**sample, "shard": identity[0], "key": identity[1]}
                with self.keeping():
                    self.attempt.bad_sample(self.world.rank, **line)
                    self._known.add(identity)  # not reached where the write failed: tried again

    def take_bad(self) -> int:
        """How many bad samples this rank found since it was last asked."""
        new, self._new = self._new, 0
        return new

    def judge_bad(self) -> None:
        """Count the bad samples of all ranks and attempts; a failure, with the shards, above the limit."""
        found = bad_samples(Run(self.attempt.run))
        if len(found) <= self._limit * self._samples:
            return
        shards = Counter(str(sample["shard"]) for sample in found).most_common(8)
        named = ", ".join(f"{shard} ({count:,})" for shard, count in shards)
        self.failure = DataError(
            f"{len(found):,} samples cannot be decoded, more than data.bad_samples.limit allows "
            f"({self._limit:g} of {self._samples:,}). By shard: {named}.",
            "See bad_samples-*.jsonl in the run's attempts; repair or remove these shards "
            "(clipcluster shards verify), or raise data.bad_samples.limit.",
        )
