"""The caption rounds of one group of sources: which samples of their shards each round holds.

Round c holds the samples with more than c captions. With one caption a sample (or none needed) there is one
round. A shard whose samples are shown C times a pass is C portions (`oversampling` says which sample lies in
which), each of which is shuffled as a shard of its own; without repeats a portion is a shard.

Kept in memory are counts by shard alone, and by portion where repeats differ by class; which samples of a
shard belong to a round is looked up in the caption counts and classes (memory-mapped) when it is reached.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np

from clipcluster.data.sampling.oversampling import Repeats, whole_copies
from clipcluster.data.shards.metadata import CaptionField, Concatenated
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
        none is never drawn. Empty: captions play no part, every sample is drawn once a pass and the draws'
        caption is -1.
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
    shown: for each source the classes it shows.

    Shards and positions are counted over all sources. Raises UserError for repeats that would need too many
    portions.
    """

    def __init__(self, sources: Sequence[SamplerSource], *, every_caption: bool) -> None:
        self.factor, self._copies = whole_copies([source.repeats for source in sources])
        self.shown = [own.shown for own in self._copies]
        most = [own.most for own in self._copies]
        self.copies = max(1, *most)
        self._n_shards = np.array([len(source.sample_counts) for source in sources])
        self._shard_starts = np.cumsum([0, *self._n_shards])
        self._portion_starts = np.cumsum([0, *self._n_shards * most])
        self.n_portions = int(self._portion_starts[-1])
        _require_few_portions(sources, self.n_portions, self.copies)
        samples = [int(source.sample_ends[-1]) if len(source.sample_ends) else 0 for source in sources]
        self._starts = np.cumsum([0, *samples])
        self._sample_counts = _joined([source.sample_counts for source in sources])
        ends = [source.sample_ends for source in sources]
        self._ends = _joined(
            [own + start if start else own for own, start in zip(ends, self._starts, strict=False)]
        )
        self._columns, self._probabilities = _fields(sources, samples)
        tables = [own.sample_counts[None] if own.more_than is None else own.more_than for own in sources]
        depth = max(map(len, tables)) if every_caption else 1
        self._counts = _joined([_of_depth(table, depth) for table in tables])
        self._by_class = {n: self._count_by_class(n) for n, own in enumerate(self._copies) if own.by_class}
        self._once = set(most) == {1} and not self._by_class
        self.sizes = np.zeros(depth, dtype=np.int64)
        for number, times in enumerate(most):
            if number in self._by_class:
                self.sizes += self._by_class[number].sum(axis=(1, 2), dtype=np.int64)
            else:
                self.sizes += self._counts[:, self._shards_of(number)].sum(axis=1, dtype=np.int64) * times
        mean = max(1, sum(samples) // max(1, len(self._ends)))
        self._held = lru_cache(maxsize=max(1, _KEPT // mean))(self._held_by)

    def counts(self, round_index: int, portions: np.ndarray) -> np.ndarray:
        """Samples that each of `portions` (n,) holds in a round, (n,) integers."""
        if self._once:
            return np.asarray(self._counts[round_index, portions])
        owners, copies, shards = self._split(portions)
        counts = self._counts[round_index, shards]
        for number, table in self._by_class.items():
            mine = owners == number
            counts[mine] = table[round_index, copies[mine], shards[mine] - self._shard_starts[number]]
        return np.asarray(counts)

    def samples(
        self, round_index: int, portions: np.ndarray, numbers: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions and copies (n,) int64 of the samples number `numbers` (n,) of a round in `portions`."""
        _, copies, shards = self._split(portions)
        positions = numbers.astype(np.int64)
        partial = np.flatnonzero(self.counts(round_index, portions) != self._sample_counts[shards])
        partial = partial[np.argsort(portions[partial], kind="stable")]
        for rows in np.split(partial, np.flatnonzero(np.diff(portions[partial])) + 1):
            if len(rows):
                positions[rows] = self._held(round_index, int(portions[rows[0]]))[positions[rows]]
        return positions + self._ends[shards] - self._sample_counts[shards], copies

    def all_samples(self, round_index: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions, ascending, and copy numbers uint8 of all draws of a round; for small sources.

        Positions are int32 where that is enough.
        """
        narrow = np.int32 if self._starts[-1] <= np.iinfo(np.int32).max else np.int64
        positions, copies = [], []
        for number, own in enumerate(self._copies):
            start, stop = self._starts[number : number + 2].tolist()
            held = start + np.flatnonzero(self._captions(start, stop) > round_index)
            kinds = own.kinds(held - start) if own.by_class else np.zeros(len(held), np.uint8)
            times = own.values[kinds].astype(np.int64)
            rows = np.repeat(np.arange(len(held)), times)
            of_sample = np.arange(len(rows)) - np.repeat(np.cumsum(times) - times, times)
            if own.by_class:
                shards = np.searchsorted(self._ends, held, side="right")
                numbers = held - self._ends[shards] + self._sample_counts[shards]
                of_sample = own.portions(of_sample, kinds[rows], own.offsets(numbers[rows]))
            positions.append(held[rows].astype(narrow))
            copies.append(of_sample.astype(np.uint8))
        return np.concatenate(positions), np.concatenate(copies)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the source (n,) and position within it (n,) of each position (n,)."""
        sources = np.searchsorted(self._starts[1:], positions, side="right")
        return sources, positions - self._starts[sources]

    def captions_at(self, positions: np.ndarray) -> np.ndarray:
        """Captions (n, fields) int64, field by field, of the samples at positions (n,).

        0 in fields that a source does not have; -1 in the first where captions are not known.
        """
        return np.stack([column[positions] for column in self._columns], axis=1).astype(np.int64)

    def probabilities_at(self, positions: np.ndarray) -> np.ndarray:
        """Probabilities (n, fields) of the caption fields at positions (n,); 1 of a field that is alone."""
        return np.asarray(self._probabilities[self.locate(positions)[0]])

    def _shards_of(self, source: int) -> slice:
        return slice(*self._shard_starts[source : source + 2].tolist())

    def _split(self, portions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, copy and shard of each portion."""
        if len(self._copies) == 1:
            return np.zeros_like(portions), *np.divmod(portions, max(1, int(self._n_shards[0])))
        owners = np.searchsorted(self._portion_starts[1:], portions, side="right")
        copies, shards = np.divmod(portions - self._portion_starts[owners], self._n_shards[owners])
        return owners, copies, shards + self._shard_starts[owners]

    def _held_by(self, round_index: int, portion: int) -> np.ndarray:
        """Numbers within its shard of the samples of a portion in a round, ascending int32."""
        owner, copy, shard = (int(found) for found in self._split(np.array(portion)))
        stop, count = int(self._ends[shard]), int(self._sample_counts[shard])
        held = self._captions(stop - count, stop) > round_index
        own = self._copies[owner]
        if own.by_class:
            kinds = own.kinds(slice(stop - count - self._starts[owner], stop - self._starts[owner]))
            held &= own.held(copy)[kinds, own.offsets(np.arange(count))]
        return np.flatnonzero(held).astype(np.int32)

    def _captions(self, start: int, stop: int) -> np.ndarray:
        """Captions of the samples start … stop - 1 in all fields, (n,); 1 where not known."""
        first, *others = (np.asarray(column[start:stop]) for column in self._columns)
        return np.where(first < 0, 1, sum((own.astype(np.int32) for own in others), first))

    def _count_by_class(self, source: int) -> np.ndarray:
        """Samples of each portion of a source in each round, (C, copies, n_shards)."""
        own, depth, start = self._copies[source], len(self._counts), self._starts[source]
        ends, lengths = self._ends[self._shards_of(source)], self._sample_counts[self._shards_of(source)]
        counts = np.zeros((depth, own.most, len(ends)), dtype=np.int32)
        cells = (depth + 1) * len(own.values) * own.most
        for span in _scan_spans(ends, lengths, cells):
            firsts, n_shards = ends[span] - lengths[span], span.stop - span.start
            low, high = int(firsts[0]), int(ends[span.stop - 1])
            numbers = np.arange(low, high) - np.repeat(firsts, lengths[span])
            captions = np.minimum(self._captions(low, high), depth, dtype=np.int64)
            cell = np.repeat(np.arange(n_shards), lengths[span]) * (depth + 1) + captions
            kinds = own.kinds(slice(low - start, high - start))
            cell = (cell * len(own.values) + kinds) * own.most + own.offsets(numbers)
            exact = np.bincount(cell, minlength=n_shards * cells).reshape(n_shards, depth + 1, -1)
            # of floats, because their products are fast; all are whole and below 2^53
            above = exact[:, :0:-1].cumsum(axis=1)[:, ::-1].astype(np.float64)
            for portion in range(own.most):
                held = own.held(portion).reshape(-1).astype(np.float64)
                counts[:, portion, span] = (above @ held).T
        return counts


def _joined(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Columns by shard of all sources, (…, n_shards); that of one source stays where it is mapped."""
    return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=-1)


def _of_depth(table: np.ndarray, depth: int) -> np.ndarray:
    return table[:depth] if len(table) >= depth else np.pad(table, ((0, depth - len(table)), (0, 0)))


def _fields(sources: Sequence[SamplerSource], samples: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """For each caption field its counts at every position; and the probabilities (sources, fields)."""
    fields = max(1, *(len(source.fields) for source in sources))
    probabilities = np.zeros((len(sources), fields))
    columns = []
    for number in range(fields):
        pieces = []
        for row, (source, size) in enumerate(zip(sources, samples, strict=True)):
            if number < len(source.fields):
                pieces.append(source.fields[number].counts)
                probabilities[row, number] = source.fields[number].probability or 1.0
            else:
                pieces.append(np.broadcast_to(np.int32(0 if number else -1), size))
        columns.append(pieces[0] if len(pieces) == 1 else cast(np.ndarray, Concatenated(pieces)))
    return columns, probabilities


def _require_few_portions(sources: Sequence[SamplerSource], portions: int, copies: int) -> None:
    shards = sum(len(source.sample_counts) for source in sources)
    if portions > max(MAX_PORTIONS, shards):
        raise UserError(
            f"the repeats of {', '.join(source.name for source in sources)} show {shards:,} shards up to"
            f" {copies} times a pass; at most {MAX_PORTIONS:,} in all. Give smaller or coarser repeats, or"
            " larger shards (clipcluster shards reshard)."
        )


def _scan_spans(ends: np.ndarray, lengths: np.ndarray, width: int) -> Iterator[slice]:
    """Spans of shards that are small enough to be scanned at once."""
    first, most = 0, max(1, _SCAN // width)
    while first < len(ends):
        last = int(np.searchsorted(ends, ends[first] - lengths[first] + _SCAN, side="right"))
        last = min(max(last, first + 1), first + most, len(ends))
        yield slice(first, last)
        first = last
