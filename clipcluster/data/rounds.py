"""What a line is laid from: the shards of one or several sources, and which of their samples a round holds.

Round c holds the samples with more than c captions. With one caption a sample (or none needed) there is one
round. Kept in memory are counts by shard alone; which samples of a shard belong to a round is looked up in
the caption counts (memory-mapped) when the shard is reached.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_SCAN = 1 << 22  # samples of the caption counts looked at together
_KEPT = 1 << 23  # sample numbers of partly captioned shards kept, in all


@dataclass(frozen=True, eq=False)
class SourceShape:
    """What the order of samples knows of one source.

    sample_counts: (n_shards,) integers, samples of each shard in the index's order.
    caption_counts: (n_samples,) integers, captions of each sample in the index's order; a sample with none is
        never drawn. None: captions play no part, every sample is drawn once a pass and Draws.caption is -1.
    weight: share of the draws; None in all sources of a recipe, or in none.
    more_than: (C, n_shards) integers, row c the samples of each shard with more than c captions; None:
        counted here, by a scan of caption_counts. C = 1 is enough unless captions are "all".
    name: for messages.
    """

    sample_counts: np.ndarray
    caption_counts: np.ndarray | None = None
    weight: float | None = None
    more_than: np.ndarray | None = None
    name: str = ""


class Rounds:
    """The shards of `shapes` in one row, and for each round which of their samples it holds.

    counts: (C, n_shards) samples of each shard in each round.
    sizes: (C,) int64, samples of each round.
    Positions count samples over all shapes. Raises ValueError where the columns of a shape disagree.
    """

    def __init__(self, shapes: Sequence[SourceShape], *, every_caption: bool) -> None:
        for shape in shapes:
            _require_agreement(shape)
        self._captions = [shape.caption_counts for shape in shapes]
        parts = [_count(shape, every_caption) for shape in shapes]
        if len(shapes) == 1:
            self._sample_counts, self.counts = np.asarray(shapes[0].sample_counts), parts[0]
        else:
            depth = max(len(part) for part in parts)
            padded = [np.pad(part, ((0, depth - len(part)), (0, 0))) for part in parts]
            self._sample_counts = np.concatenate([shape.sample_counts for shape in shapes])
            self.counts = np.concatenate(padded, axis=1)
        self.sizes = self.counts.sum(axis=1, dtype=np.int64)
        self._starts = np.zeros(len(self._sample_counts) + 1, dtype=np.int64)
        np.cumsum(self._sample_counts, out=self._starts[1:])
        self._shard_ends = np.cumsum([len(shape.sample_counts) for shape in shapes])
        self._source_starts = self._starts[np.concatenate([[0], self._shard_ends])]
        self._chosen: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._chosen_size = 0

    def positions(self, turn: int, shards: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Positions (n,) int64 of the samples with number `indices` (n,) among a round's of `shards` (n,)."""
        positions = self._starts[shards] + indices
        partial = np.flatnonzero(self.counts[turn, shards] != self._sample_counts[shards])
        if len(partial):
            partial = partial[np.argsort(shards[partial], kind="stable")]
            bounds = np.flatnonzero(np.diff(shards[partial])) + 1
            for rows in np.split(partial, bounds):
                shard = int(shards[rows[0]])
                positions[rows] = self._starts[shard] + self._samples_in(turn, shard)[indices[rows]]
        return positions

    def all_positions(self, turn: int) -> np.ndarray:
        """Positions of all samples of a round, ascending, int32 where that is enough; for small sources."""
        narrow = np.int32 if self._starts[-1] <= np.iinfo(np.int32).max else np.int64
        parts = []
        for (start, stop), captions in zip(
            pairwise(self._source_starts.tolist()), self._captions, strict=True
        ):
            if captions is None:
                parts.append(np.arange(start, stop if turn == 0 else start, dtype=narrow))
            else:
                parts.append((np.flatnonzero(np.asarray(captions) > turn) + start).astype(narrow))
        return np.concatenate(parts)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the shape (n,) and position within it (n,) of each position (n,)."""
        sources = np.searchsorted(self._source_starts[1:], positions, side="right")
        return sources, positions - self._source_starts[sources]

    def captions_at(self, sources: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Captions (n,) int64 of the samples `places` (n,) of the shapes `sources` (n,); -1: not known."""
        counts = np.full(len(places), -1, dtype=np.int64)
        for number, captions in enumerate(self._captions):
            if captions is not None:
                mine = sources == number
                counts[mine] = captions[places[mine]]
        return counts

    def _samples_in(self, turn: int, shard: int) -> np.ndarray:
        """Numbers within a shard of its samples in a round, ascending int32; the last ones used are kept."""
        if (turn, shard) in self._chosen:
            self._chosen.move_to_end((turn, shard))
            return self._chosen[turn, shard]
        source = int(np.searchsorted(self._shard_ends, shard, side="right"))
        captions = self._captions[source]
        assert captions is not None, "a shard without caption counts is whole in every round"
        start, stop = (self._starts[shard : shard + 2] - self._source_starts[source]).tolist()
        chosen = np.flatnonzero(np.asarray(captions[start:stop]) > turn).astype(np.int32)
        self._chosen[turn, shard] = chosen
        self._chosen_size += len(chosen)
        while self._chosen_size > _KEPT and len(self._chosen) > 1:
            self._chosen_size -= len(self._chosen.popitem(last=False)[1])
        return chosen


def _require_agreement(shape: SourceShape) -> None:
    samples = int(np.sum(shape.sample_counts, dtype=np.int64))
    if shape.caption_counts is not None and len(shape.caption_counts) != samples:
        raise ValueError(
            f"source {shape.name!r}: {len(shape.caption_counts):,} caption counts for {samples:,} samples"
        )
    if shape.more_than is not None and shape.more_than.shape[1] != len(shape.sample_counts):
        raise ValueError(f"source {shape.name!r}: more_than has {shape.more_than.shape[1]:,} shards")


def _count(shape: SourceShape, every_caption: bool) -> np.ndarray:
    """Samples of each shard in each round, (C, n_shards)."""
    if shape.caption_counts is None:
        return np.asarray(shape.sample_counts)[None]
    if shape.more_than is not None:
        return np.asarray(shape.more_than if every_caption else shape.more_than[:1])
    ends = np.cumsum(shape.sample_counts, dtype=np.int64)
    captions = shape.caption_counts
    depth = 1
    if every_caption:
        depth = max((int(captions[low:high].max()) for _, _, low, high in _stretches(ends, 1)), default=0)
    counts = np.zeros((max(depth, 1), len(ends)), dtype=np.int32)
    for first, last, low, high in _stretches(ends, depth + 1):
        lengths = np.asarray(shape.sample_counts[first:last])
        values = np.minimum(captions[low:high], depth)
        least = int(values.min())
        counts[:least, first:last] = lengths
        if least < values.max():
            rows = np.repeat(np.arange(last - first) * (depth + 1), lengths)
            table = np.bincount(rows + values, minlength=(last - first) * (depth + 1))
            exact = table.reshape(last - first, depth + 1)
            counts[:, first:last] = exact[:, :0:-1].cumsum(axis=1)[:, ::-1].T
    return counts


def _stretches(ends: np.ndarray, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Stretches of shards small enough to be scanned at once: first and last shard, first and last sample."""
    first, most = 0, max(1, _SCAN // width)
    while first < len(ends):
        low = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, low + _SCAN, side="right"))
        last = min(max(last, first + 1), first + most)
        if ends[last - 1] > low:
            yield first, last, low, int(ends[last - 1])
        first = last
