"""Samples that could not be decoded: each is recorded once, and too many of them end the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import bad_samples
from clipcluster.runtime.outcome import DataError

LEAST_SAMPLES = 1000
"""The limit is a fraction of at least so many samples, so that one bad image does not end a small run."""


class BadSamples:
    """Records those of this rank; rank 0 counts what all ranks recorded in all attempts.

    Args:
        samples: of all sources.
        limit: fraction of them that may be bad.
    """

    def __init__(self, run: Run, attempt: Attempt, *, rank: int, samples: int, limit: float) -> None:
        self._run, self._attempt, self._rank = run, attempt, rank
        self._samples, self._limit = max(LEAST_SAMPLES, samples), limit
        self._known: set[tuple[str, str]] = set()
        self._new = 0

    def note(self, bad: Iterable[Mapping[str, Any]]) -> None:
        """Record the bad samples of a batch (`shard`, `key`, `reason`). Raises StaleAttempt."""
        for sample in bad:
            identity = (str(sample["shard"]), str(sample["key"]))
            if identity not in self._known:
                self._known.add(identity)
                self._new += 1
                self._attempt.bad_sample(self._rank, **{**sample, "shard": identity[0], "key": identity[1]})

    def take_new(self) -> int:
        """How many this rank found since it was last asked."""
        new, self._new = self._new, 0
        return new

    def judge(self) -> None:
        """Count the run's distinct bad samples. Raises DataError, naming the shards, above the limit."""
        found = bad_samples(self._run)
        if len(found) <= self._limit * self._samples:
            return
        shards = Counter(str(sample["shard"]) for sample in found).most_common(8)
        named = ", ".join(f"{shard} ({count:,})" for shard, count in shards)
        raise DataError(
            f"{len(found):,} samples cannot be decoded, more than data.bad_samples.limit allows "
            f"({self._limit:g} of {self._samples:,}). By shard: {named}.",
            "See bad_samples-*.jsonl in the run's attempts; repair or remove these shards "
            "(clipcluster shards verify), or raise data.bad_samples.limit.",
        )
