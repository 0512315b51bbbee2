"""The caption rounds of one group of sources: which samples of their shards each round holds.

Round c holds the samples with more than c captions. With one caption a sample (or none needed) there is one
round. A shard whose samples are shown C times a pass is C portions (`oversampling` says which sample lies in
which), each of which is shuffled as a shard of its own; without repeats a portion is a shard.

Kept in memory are counts by shard alone, and by portion where repeats differ by class; which samples of a
shard belong to a round is looked up in the caption counts and classes (memory-mapped) when it is reached.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from clipcluster.data.sampling.lru_cache import LruCache
from clipcluster.data.sampling.oversampling import Copies, Repeats, whole_copies
from clipcluster.data.shards.metadata import CaptionField
from clipcluster.errors import UserError

MAX_PORTIONS = 1 << 25  # 4 bytes each in every rank
_SCAN = 1 << 19  # samples of the caption counts looked at together
_KEPT = 1 << 23  # numbers of samples in partial portions that are kept, in all


@dataclass(frozen=True, eq=False)
class SamplerSource:
    """What the sampler knows of one source.

    sample_counts: (n_shards,) integers, samples of each shard in the index's order.
    sample_ends: (n_shards,) int64, running sum of sample_counts.
    fields: the counts of captions, of several fields each with its probability (above zero); a sample with
        none is never drawn. Empty: captions play no part, every sample is drawn once a pass and Draws.caption
        is -1.
    more_than: (C, n_shards) integers, row c the samples of each shard with more than c captions, wherever
        there are fields. C = 1 is enough unless captions are "all".
    weight: mixing weight, the source's part of the draws; None in all sources of a recipe, or in none.
    name: for messages.
    repeats: how often each sample is drawn in a pass; None: once.
    """

    sample_counts: np.ndarray
    sample_ends: np.ndarray
    fields: Sequence[CaptionField] = ()
    more_than: np.ndarray | None = None
    weight: float | None = None
    name: str = ""
    repeats: Repeats | None = None


class CaptionRounds:
    """The portions of several sources, and for each round which samples they hold.

    sizes: (C,) int64, draws of each round, copies counted.
    copies: portions of a shard, the most of any source. factor: what the written repeats were multiplied by.
    n_portions: in all, source by source, and in each the first portion of every shard, then the second, ….
    fields: the most caption fields of a source, at least 1. shown: for each source the classes it shows.

    Positions count samples over all sources. Raises ValueError where the columns of a source disagree, and
    UserError for repeats that would need too many portions.
    """

    def __init__(self, sources: Sequence[SamplerSource], *, every_caption: bool) -> None:
        self.factor, copies = whole_copies([source.repeats for source in sources])
        _require_few_portions(sources, copies)
        self._sources = [
            _SourceRounds(source, own, every_caption) for source, own in zip(sources, copies, strict=True)
        ]
        self.shown = [own.shown for own in copies]
        self.copies = max(1, *(own.most for own in copies))
        self.fields = max(1, *(len(source.fields) for source in self._sources))
        self.sizes = np.zeros(max(len(source.counts) for source in self._sources), dtype=np.int64)
        for source in self._sources:
            self.sizes[: len(source.counts)] += source.sizes()
        self._portion_starts = np.cumsum([0, *(source.n_portions for source in self._sources)])
        self._source_starts = np.cumsum([0, *(source.n_samples for source in self._sources)])
        self.n_portions = int(self._portion_starts[-1])
        self._held = LruCache(_KEPT, len)

    def counts(self, round_index: int, portions: np.ndarray) -> np.ndarray:
        """Samples that each of `portions` (n,) holds in a round, (n,) integers."""
        if len(self._sources) == 1:
            return self._sources[0].counts_of(round_index, portions)
        counts = np.zeros(portions.shape, dtype=np.int64)
        for source, mine, own in self._by_source(portions):
            counts[mine] = source.counts_of(round_index, own)
        return counts

    def samples(
        self, round_index: int, portions: np.ndarray, numbers: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions and copies (n,) int64 of the samples number `numbers` (n,) of a round in `portions`."""
        positions = numbers.astype(np.int64)
        copies = np.empty(len(portions), dtype=np.int64)
        for (source, mine, own), first in zip(
            self._by_source(portions), self._source_starts.tolist(), strict=False
        ):
            copies[mine], shards = np.divmod(own, max(source.n_shards, 1))
            whole = source.counts_of(round_index, own) == source.sample_counts[shards]
            if not whole.all():
                self._number_in_shard(round_index, portions, positions, np.flatnonzero(mine)[~whole])
            positions[mine] += first + source.ends[shards] - source.sample_counts[shards]
        return positions, copies

    def all_samples(self, round_index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Positions and copy numbers of all draws of a round, ascending; for small sources.

        Positions are int32 where that is enough; copy numbers None where all are 0.
        """
        narrow = np.int32 if self._source_starts[-1] <= np.iinfo(np.int32).max else np.int64
        positions, copies = [], []
        for source, first in zip(self._sources, self._source_starts.tolist(), strict=False):
            of_source, copies_of_source = source.all_samples(round_index)
            positions.append((of_source + first).astype(narrow))
            copies.append(copies_of_source)
        return np.concatenate(positions), np.concatenate(copies) if self.copies > 1 else None

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the source (n,) and position within it (n,) of each position (n,)."""
        sources = np.searchsorted(self._source_starts[1:], positions, side="right")
        return sources, positions - self._source_starts[sources]

    def captions_at(self, sources: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Captions (n, fields) int64, field by field, of samples by source (n,) and position within it (n,).

        0 in fields that a source does not have; -1 in the first where captions are not known.
        """
        counts = np.zeros((len(positions), self.fields), dtype=np.int64)
        for number, source in enumerate(self._sources):
            mine = sources == number
            for column, own in enumerate(source.fields):
                counts[mine, column] = own.counts[positions[mine]]
            if not source.fields:
                counts[mine, 0] = -1
        return counts

    def probabilities_at(self, sources: np.ndarray) -> np.ndarray | None:
        """Probabilities (n, fields) of the caption fields of sources (n,); None where there is one field."""
        if self.fields == 1:
            return None
        table = np.zeros((len(self._sources), self.fields))
        for number, source in enumerate(self._sources):
            table[number, : len(source.fields)] = [own.probability or 1.0 for own in source.fields]
        return np.asarray(table[sources])

    def _by_source(self, portions: np.ndarray) -> Iterator[tuple["_SourceRounds", np.ndarray, np.ndarray]]:
        """Each source, which of `portions` (n,) are its own, and their numbers within it."""
        if len(self._sources) == 1:
            yield self._sources[0], np.ones(portions.shape, dtype=bool), portions
            return
        owners = np.searchsorted(self._portion_starts[1:], portions, side="right")
        for number, source in enumerate(self._sources):
            mine = owners == number
            yield source, mine, portions[mine] - self._portion_starts[number]

    def _number_in_shard(
        self, round_index: int, portions: np.ndarray, numbers: np.ndarray, partial: np.ndarray
    ) -> None:
        """Turns `numbers` at the rows `partial`, counted among what is held, into those of the shard."""
        partial = partial[np.argsort(portions[partial], kind="stable")]
        bounds = np.flatnonzero(np.diff(portions[partial])) + 1
        for rows in np.split(partial, bounds):
            numbers[rows] = self._held_by(round_index, int(portions[rows[0]]))[numbers[rows]]

    def _held_by(self, round_index: int, portion: int) -> np.ndarray:
        """Numbers within its shard of the samples of a portion in a round, int32."""

        def make() -> np.ndarray:
            owner = int(np.searchsorted(self._portion_starts[1:], portion, side="right"))
            return self._sources[owner].held_by(round_index, portion - int(self._portion_starts[owner]))

        return np.asarray(self._held.get((round_index, portion), make))


class _SourceRounds:
    """One source of the group: its counts, `(C, 1 or copies, n_shards)`, and its mapped columns."""

    def __init__(self, source: SamplerSource, copies: Copies, every_caption: bool) -> None:
        self.fields = source.fields
        self._copies = copies
        self.sample_counts = np.asarray(source.sample_counts)
        self.n_shards = len(self.sample_counts)
        self.n_portions = copies.most * self.n_shards
        _require_agreement(source)
        self.ends = source.sample_ends
        self.n_samples = int(self.ends[-1]) if self.n_shards else 0
        by_round = self.sample_counts[None] if source.more_than is None else np.asarray(source.more_than)
        by_round = by_round if every_caption else by_round[:1]
        self.counts = self._count_by_class(len(by_round)) if copies.by_class else by_round[:, None]

    def sizes(self) -> np.ndarray:
        """Draws of each round, (C,) int64."""
        times = self._copies.most if self.counts.shape[1] == 1 else 1
        return np.asarray(self.counts.sum(axis=(1, 2), dtype=np.int64) * times)

    def counts_of(self, round_index: int, portions: np.ndarray) -> np.ndarray:
        """Samples of each portion in a round, (n,)."""
        if round_index >= len(self.counts):
            return np.zeros(portions.shape, dtype=np.int64)
        if self._copies.most == 1:
            return np.asarray(self.counts[round_index, 0, portions])
        if self.counts.shape[1] == 1:
            return np.asarray(self.counts[round_index, 0, portions % self.n_shards])
        return np.asarray(self.counts[round_index].reshape(-1)[portions])

    def held_by(self, round_index: int, portion: int) -> np.ndarray:
        """Numbers within its shard of the samples of a portion in a round, ascending int32."""
        copy, shard = divmod(portion, self.n_shards)
        stop = int(self.ends[shard])
        start = stop - int(self.sample_counts[shard])
        held = np.ones(stop - start, dtype=bool)
        if self.fields:
            held &= self._captions(start, stop) > round_index
        if self._copies.by_class:
            held &= self._copies.in_portion(copy, start, stop)
        return np.flatnonzero(held).astype(np.int32)

    def all_samples(self, round_index: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions within the source, ascending, and copy numbers uint8 of all draws of a round."""
        if round_index >= len(self.counts) or not self.n_samples:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint8)
        if self.fields:
            positions = np.flatnonzero(self._captions(0, self.n_samples) > round_index)
        else:
            positions = np.arange(self.n_samples)
        kinds = self._copies.kinds(0, self.n_samples)[positions]
        times = self._copies.values[kinds].astype(np.int64)
        rows = np.repeat(np.arange(len(positions)), times)
        copies = np.arange(len(rows)) - np.repeat(np.cumsum(times) - times, times)
        if self._copies.by_class:
            starts = np.repeat(self.ends - self.sample_counts, self.sample_counts)
            offsets = self._copies.offsets((positions - starts[positions])[rows])
            copies = self._copies.portions(copies, kinds[rows], offsets)
        return positions[rows], copies.astype(np.uint8)

    def _captions(self, start: int, stop: int) -> np.ndarray:
        """Captions of the samples start … stop - 1 in all fields, (n,) integers."""
        first = np.asarray(self.fields[0].counts[start:stop])
        return sum((np.asarray(own.counts[start:stop], np.int64) for own in self.fields[1:]), first)

    def _count_by_class(self, depth: int) -> np.ndarray:
        """Samples of each portion in each round, (depth, copies, n_shards)."""
        most, kinds = self._copies.most, len(self._copies.values)
        counts = np.zeros((depth, most, self.n_shards), dtype=np.int32)
        cells = (depth + 1) * kinds * most
        for first, last, low, high in _scan_spans(self.ends, cells):
            lengths = self.sample_counts[first:last]
            starts = self.ends[first:last] - lengths
            numbers = np.arange(low, high) - np.repeat(starts, lengths)
            captions = np.minimum(self._captions(low, high), depth) if self.fields else depth
            cell = np.repeat(np.arange(last - first), lengths) * (depth + 1) + captions
            cell = (cell * kinds + self._copies.kinds(low, high)) * most + self._copies.offsets(numbers)
            exact = np.bincount(cell, minlength=(last - first) * cells)
            exact = exact.reshape(last - first, depth + 1, kinds * most)
            # of floats, because their products are fast; all are whole and below 2^53
            above = exact[:, :0:-1].cumsum(axis=1)[:, ::-1].astype(np.float64)
            for portion in range(most):
                held = self._copies.held(portion).reshape(-1).astype(np.float64)
                counts[:, portion, first:last] = (above @ held).T
        return counts


def _require_agreement(source: SamplerSource) -> None:
    samples = int(np.sum(source.sample_counts, dtype=np.int64))
    for own in source.fields:
        if len(own.counts) != samples:
            raise ValueError(
                f"source {source.name!r}: {len(own.counts):,} caption counts for {samples:,} samples"
            )
        if own.probability is not None and not own.probability > 0:
            raise ValueError(f"source {source.name!r}: a caption field has the probability {own.probability}")
    classes = source.repeats.classes if source.repeats is not None else None
    if classes is not None and len(classes) != samples:
        raise ValueError(f"source {source.name!r}: {len(classes):,} classes for {samples:,} samples")
    more_than = source.more_than
    if (more_than is not None) != bool(source.fields):
        raise ValueError(f"source {source.name!r}: more_than stands beside the counts of captions")
    if more_than is not None and more_than.shape[1] != len(source.sample_counts):
        raise ValueError(f"source {source.name!r}: more_than has {more_than.shape[1]:,} shards")


def _require_few_portions(sources: Sequence[SamplerSource], copies: Sequence[Copies]) -> None:
    shards = sum(len(source.sample_counts) for source in sources)
    portions = sum(own.most * len(source.sample_counts) for own, source in zip(copies, sources, strict=True))
    if portions > max(MAX_PORTIONS, shards):
        raise UserError(
            f"the repeats of {', '.join(source.name for source in sources)} show {shards:,} shards up to"
            f" {max(own.most for own in copies)} times a pass; at most {MAX_PORTIONS:,} in all. Give"
            " smaller or coarser repeats, or larger shards (clipcluster shards reshard)."
        )


def _scan_spans(ends: np.ndarray, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Spans of shards small enough to be scanned at once: first and last shard, first and last sample."""
    first, most = 0, max(1, _SCAN // width)
    while first < len(ends):
        low = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, low + _SCAN, side="right"))
        last = min(max(last, first + 1), first + most)
        if ends[last - 1] > low:
            yield first, last, low, int(ends[last - 1])
        first = last
