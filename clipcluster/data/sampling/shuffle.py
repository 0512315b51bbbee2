"""The order of one group of sources that are drawn as one: which sample is drawn when, pass after pass.

A pass is its caption rounds one after the other. A round is laid out in one of two ways:

- small groups: all its samples are permuted (full shuffle);
- large ones: its shards (with repeats, their portions) are permuted, their samples concatenated and rotated,
  the sequence is cut into L lanes whose lengths differ by one at most, and draw v is offset v div L of lane
  v mod L, shuffled within the lane's windows. So a batch reads from L positions of the data at once, each
  advancing slowly.

Everything is computed from (seed, group, pass, round) when it is reached; what is kept can be computed again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from clipcluster.data.sampling.caption_rounds import CaptionRounds
from clipcluster.data.sampling.lru_cache import LruCache
from clipcluster.data.sampling.permutation import key, permutation, permutations, subkeys

_BLOCK = 16  # portions of shards whose ends are found together, where there are many
_MANY = 1 << 16


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Where draws lie, arrays (n,) int64: pass, round, lane, offset within the lane."""

    pass_index: np.ndarray
    round_index: np.ndarray
    lane: np.ndarray
    offset: np.ndarray

    def __getitem__(self, rows: slice | np.ndarray) -> "Coordinates":
        return Coordinates(self.pass_index[rows], self.round_index[rows], self.lane[rows], self.offset[rows])


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples at coordinates, arrays (n,) int64.

    position: counted over all sources.
    pass_index: pass x copies + copy: every copy of a sample goes through the source in a pass of its own.
    """

    position: np.ndarray
    pass_index: np.ndarray


class GroupSampler:
    """The order of the samples of `rounds` under (seed, number), of which a batch draws about `per_batch`.

    pass_draws: draws of one pass, the sum of the round sizes or less. lanes: an upper bound of the lanes;
    `.lanes` is what is used. window: draws of a lane that are shuffled together. full_shuffle: permute each
    round whole, without lanes.
    """

    def __init__(
        self,
        rounds: CaptionRounds,
        *,
        seed: int,
        number: int,
        per_batch: int,
        pass_draws: int,
        lanes: int,
        window: int,
        full_shuffle: bool,
    ) -> None:
        self.rounds = rounds
        self.pass_draws = pass_draws
        self.lanes = 1 if full_shuffle else count_lanes(per_batch, lanes)
        self._name = (seed, number)
        self._window = window
        self._full_shuffle = full_shuffle
        self._ends = np.cumsum(rounds.sizes)
        # a batch may touch two passes or rounds, seldom more
        self._layouts = LruCache(2)
        self._windows = LruCache(4)

    def coordinates(self, numbers: np.ndarray) -> Coordinates:
        """Where the draws `numbers` (n,) int64 of this group lie, sorted by (pass, round, lane, offset)."""
        pass_index, time = numbers // self.pass_draws, numbers % self.pass_draws
        round_index = np.zeros_like(time)
        if len(self._ends) > 1:
            time = (time + self._first_draws(pass_index)) % self._ends[-1]
            round_index = np.searchsorted(self._ends, time, side="right")
            time -= self._ends[round_index] - self.rounds.sizes[round_index]
        offset, lane = np.divmod(time, self.lanes)
        order = np.lexsort((offset, lane, round_index, pass_index))
        return Coordinates(pass_index, round_index, lane, offset)[order]

    def samples(self, at: Coordinates) -> Samples:
        """The samples (n,) at coordinates."""
        positions, copies = np.empty((2, len(at.offset)), dtype=np.int64)
        for pass_index, round_index, rows in _equal_spans(at.pass_index, at.round_index):
            find = self._fully_shuffled if self._full_shuffle else self._in_lanes
            positions[rows], copies[rows] = find(pass_index, round_index, at[rows])
        return Samples(positions, at.pass_index * self.rounds.copies + copies)

    def captions(
        self,
        at: Coordinates,
        samples: Samples,
        counts: np.ndarray,
        probabilities: np.ndarray | None,
        choice: str,
    ) -> np.ndarray:
        """Which of its captions (n,) int32 each sample shows; -1 where `counts` is -1, not known.

        counts: (n, fields), captions of each sample field by field; captions are numbered through all fields.
        probabilities: (n, fields), of each field, if there are several. choice "first": the first of the
        field drawn; "random": one of it by (seed, source, pass, copy, sample); "all": the round's in a
        permutation of the sample's captions by (seed, source, pass, sample).
        """
        known = counts[:, 0] >= 0
        captions = np.full(len(known), -1, dtype=np.int32)
        if choice == "all":
            for pass_index, _, rows in _equal_spans(at.pass_index):
                of_samples = subkeys(key(*self._name, pass_index, "captions"), samples.position[rows])
                for count in np.unique(counts[rows, 0][known[rows]]).tolist():
                    having = np.flatnonzero(counts[rows, 0] == count)
                    order = permutations(of_samples[having], count)
                    captions[rows][having] = order[np.arange(len(having)), at.round_index[rows][having]]
            return captions
        before = np.zeros(len(known), dtype=np.int64)
        if probabilities is not None:
            drawn = _draw_fields(self._words(samples, "fields"), counts, probabilities)[:, None]
            before = np.take_along_axis(np.cumsum(counts, axis=1) - counts, drawn, axis=1)[:, 0]
            counts = np.take_along_axis(counts, drawn, axis=1)
        if choice == "random":
            words = self._words(samples, "captions")
            before += (words % np.maximum(counts[:, 0], 1).astype(np.uint64)).astype(np.int64)
        captions[known] = before[known]
        return captions

    def _words(self, samples: Samples, what: str) -> np.ndarray:
        """A random word (n,) uint64 for each sample by (seed, source, pass, copy, sample)."""
        passes, rows = np.unique(samples.pass_index, return_inverse=True)
        parents = [key(*self._name, pass_index, what) for pass_index in passes.tolist()]
        return subkeys(np.array(parents, np.uint64)[rows], samples.position)

    def _first_draws(self, pass_index: np.ndarray) -> np.ndarray:
        """How far into its rounds each draw's pass begins (n,); else the cut always hit the last round."""
        firsts = np.empty_like(pass_index)
        for number, _, rows in _equal_spans(pass_index):
            firsts[rows] = key(*self._name, number, "first draw") % int(self._ends[-1])
        return firsts

    def _fully_shuffled(
        self, pass_index: int, round_index: int, at: Coordinates
    ) -> tuple[np.ndarray, np.ndarray | int]:
        def make() -> tuple[np.ndarray, np.ndarray | None]:
            positions, copies = self.rounds.all_samples(round_index)
            order = permutation(key(*self._name, pass_index, round_index, "whole"), len(positions))
            return positions[order], None if copies is None else copies[order]

        positions, copies = self._layouts.get((pass_index, round_index), make)
        return positions[at.offset], 0 if copies is None else copies[at.offset]

    def _in_lanes(self, pass_index: int, round_index: int, at: Coordinates) -> tuple[np.ndarray, np.ndarray]:
        def make() -> _PortionOrder:
            name = *self._name, pass_index, round_index
            return _PortionOrder(self.rounds, round_index, key(*name, "shards"), key(*name, "portions"))

        portions = self._layouts.get((pass_index, round_index), make)
        size = int(self.rounds.sizes[round_index])
        length, longer = divmod(size, self.lanes)
        starts = at.lane * length + np.minimum(at.lane, longer)
        rotation = key(*self._name, pass_index, round_index, "rotation") % size
        along = (starts + self._window_shuffled(pass_index, round_index, at, size) + rotation) % size
        return self.rounds.samples(round_index, *portions.locate(along))

    def _window_shuffled(self, pass_index: int, round_index: int, at: Coordinates, size: int) -> np.ndarray:
        """Offsets within their lanes after the shuffle in windows, (n,)."""
        windows, within = np.divmod(at.offset, self._window)
        shuffled = windows * self._window
        for window in np.unique(windows).tolist():
            rows = np.flatnonzero(windows == window)

            def make(window: int = window) -> _Window:
                parent = key(*self._name, pass_index, round_index, window, "window")
                return _Window(parent, size, self.lanes, self._window, window)

            orders = self._windows.get((pass_index, round_index, window), make)
            shuffled[rows] += orders.shuffled(at.lane[rows], within[rows])
        return shuffled


class _PortionOrder:
    """The portions of shards of a round in permuted order, their samples concatenated.

    Of many, only every 16th of the offsets where they end is kept: of 1.28 million 0.6 MB instead of 10.

    Several portions of one shard each begin at another of its samples: shards of one size may end at the same
    time in all lanes, and then two portions of a shard side by side would show the same samples together.
    """

    def __init__(self, rounds: CaptionRounds, round_index: int, parent: int, beginnings: int) -> None:
        self._rounds, self._round, self._beginnings = rounds, round_index, beginnings
        self._portions = permutation(parent, rounds.n_portions).astype(np.int32)
        self._block = _BLOCK if len(self._portions) > _MANY else 1
        sums = []  # block by block, as permutations are made
        for first in range(0, len(self._portions), _MANY):
            counts = rounds.counts(round_index, self._portions[first : first + _MANY])
            sums.append(np.add.reduceat(counts, np.arange(0, len(counts), self._block), dtype=np.int64))
        self._ends = np.cumsum(np.concatenate(sums))

    def locate(self, along: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The portion (n,) that holds each sample `along` (n,) of the round, and its number there (n,)."""
        blocks = np.searchsorted(self._ends, along, side="right")
        rest = along - np.where(blocks > 0, self._ends[blocks - 1], 0)
        # the last block may be shorter: what is repeated there lies behind every sample asked for
        rows = np.minimum(blocks[:, None] * self._block + np.arange(self._block), len(self._portions) - 1)
        portions = self._portions[rows]
        counts = self._rounds.counts(self._round, portions)
        ends = np.cumsum(counts, axis=1, dtype=np.int64)
        column = np.sum(ends <= rest[:, None], axis=1)
        here = np.arange(len(along)), column
        found, held = portions[here], counts[here].astype(np.int64)
        numbers = rest - (ends[here] - held)
        if self._rounds.copies > 1:
            firsts = subkeys(self._beginnings, found) % held.astype(np.uint64)
            numbers = (numbers + firsts.astype(np.int64)) % held
        return found, numbers


class _Window:
    """Window number `window` of all lanes of a round: each lane's shuffle is made when first asked for."""

    def __init__(self, parent: int, size: int, lanes: int, length: int, window: int) -> None:
        self._parent = parent
        lane_lengths = size // lanes + (np.arange(lanes) < size % lanes)
        self._lengths = np.clip(lane_lengths - window * length, 0, length)
        self._made = np.zeros(lanes, dtype=bool)
        self._orders = np.empty((lanes, int(self._lengths.max())), dtype=np.int32)

    def shuffled(self, lanes: np.ndarray, within: np.ndarray) -> np.ndarray:
        """Offset in the window (n,) that the draw `within` (n,) of its lane `lanes` (n,) shows."""
        if not self._made[lanes].all():
            missing = np.unique(lanes[~self._made[lanes]])
            for length in np.unique(self._lengths[missing]).tolist():
                alike = missing[self._lengths[missing] == length]
                self._orders[alike, :length] = permutations(subkeys(self._parent, alike), length)
            self._made[missing] = True
        return self._orders[lanes, within]


def _draw_fields(words: np.ndarray, counts: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """A caption field (n,) for each sample: by `probabilities` (n, fields) among those that have captions.

    words: (n,) uint64, random. The arithmetic is exact in its order, so that no machine draws another.
    """
    reached = np.cumsum(np.where(counts > 0, probabilities, 0.0), axis=1)
    chance = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in [0, 1)
    drawn = np.sum(reached <= (chance * reached[:, -1])[:, None], axis=1)
    # where captions are not known nothing can be reached
    return np.minimum(drawn, counts.shape[1] - 1)


def count_lanes(per_batch: int, most: int) -> int:
    """The largest divisor of `per_batch` not above `most`, so that every batch draws alike from each lane.

    Where that divisor is below half of what is possible (a batch size of 2 x 509), as many as are possible:
    the lanes then move from rank to rank, but a batch does not come from two shards.
    """
    possible = min(most, per_batch)
    largest = next(number for number in range(possible, 0, -1) if per_batch % number == 0)
    return largest if 2 * largest > possible else possible


def _equal_spans(first: np.ndarray, second: np.ndarray | None = None) -> Iterator[tuple[int, int, slice]]:
    """Each span of draws with one value in both arrays (sorted by them): the two values and the slice."""
    if not len(first):
        return
    changes = np.diff(first) != 0
    if second is not None:
        changes |= np.diff(second) != 0
    bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(first)]
    for start, stop in pairwise(bounds):
        yield int(first[start]), 0 if second is None else int(second[start]), slice(start, stop)
