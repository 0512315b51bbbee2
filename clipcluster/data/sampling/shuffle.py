"""The order of one group of sources that are drawn as one: which sample is drawn when, pass after pass.

A pass is its caption rounds one after the other. A round is laid out in one of two ways:

- small groups: all its samples are permuted (full shuffle);
- large ones: its shards (with repeats, their portions) are permuted, their samples concatenated and rotated,
  the sequence is cut into L lanes whose lengths differ by one at most, and draw v is offset v div L of lane
  v mod L, shuffled within the lane's windows. So a batch reads from L positions of the data at once, each
  advancing slowly.

Everything is computed from (seed, group, pass, round) when it is reached; what is kept can be computed again.
"""

from functools import lru_cache

import numpy as np

from clipcluster.data.sampling.caption_rounds import CaptionRounds
from clipcluster.data.sampling.permutation import key, permutation, permutations, subkeys

_BLOCK = 16  # portions of shards whose ends are found together, where there are many
_MANY = 1 << 16


class GroupSampler:
    """The order of the samples of `rounds` under (seed, number), of which a batch draws about `per_batch`.

    pass_draws: draws of one pass, the sum of the round sizes or less. lanes: an upper bound of the lanes;
    `.lanes` is what is used. window: draws of a lane that are shuffled together. full_shuffle: permute each
    round whole, without lanes. captions: "all", "random" or "first", as of `Sampler`.
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
        captions: str,
    ) -> None:
        self.rounds = rounds
        self.pass_draws = pass_draws
        self.lanes = 1 if full_shuffle else count_lanes(per_batch, lanes)
        self._name = (seed, number)
        self._window = window
        self._captions = captions
        self._find = self._fully_shuffled if full_shuffle else self._in_lanes
        self._ends = np.cumsum(rounds.sizes)
        # a batch may touch two passes or rounds, seldom more
        self._whole = lru_cache(maxsize=2)(self._shuffle_whole)
        self._portions = lru_cache(maxsize=2)(self._order_portions)
        self._windows = lru_cache(maxsize=4)(self._shuffle_window)

    def draws(self, numbers: np.ndarray, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pass, position (counted over all sources) and caption of `rows` of the draws `numbers` (n,).

        Those are taken in order of (pass, round, lane, offset). Where samples have several copies, the
        pass is pass x copies + copy: every copy goes through the source in a pass of its own.
        """
        at = self.coordinates(numbers)[:, rows]
        positions, copies = np.empty((2, at.shape[1]), dtype=np.int64)
        changes = np.flatnonzero(np.diff(at[:2]).any(axis=0)) + 1
        for span in np.split(np.arange(at.shape[1]), changes):
            pass_index, round_index = at[:2, span[0]].tolist()
            positions[span], copies[span] = self._find(pass_index, round_index, *at[2:, span])
        passes = at[0] * self.rounds.copies + copies
        return passes, positions, self._captions_of(at[0], at[1], passes, positions)

    def coordinates(self, numbers: np.ndarray) -> np.ndarray:
        """Pass, round, lane and offset within the lane of the draws `numbers`, (4, n) int64, sorted."""
        pass_index, time = numbers // self.pass_draws, numbers % self.pass_draws
        round_index = np.zeros_like(time)
        if len(self._ends) > 1:
            # a pass begins anywhere in its rounds: else the cut always hit the last one
            firsts = self._keys(pass_index, "first draw") % np.uint64(self._ends[-1])
            time = (time + firsts.astype(np.int64)) % self._ends[-1]
            round_index = np.searchsorted(self._ends, time, side="right")
            time -= self._ends[round_index] - self.rounds.sizes[round_index]
        offset, lane = np.divmod(time, self.lanes)
        order = np.lexsort((offset, lane, round_index, pass_index))
        return np.stack([pass_index, round_index, lane, offset])[:, order]

    def _captions_of(
        self, pass_index: np.ndarray, round_index: np.ndarray, passes: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Which of its captions (n,) int64 each sample shows; -1 where they are not known.

        Numbered through all fields. "first": the first of the field drawn; "random": one of it by (seed,
        source, pass, copy, sample); "all": the round's in a permutation of the sample's captions by (seed,
        source, pass, sample).
        """
        counts = self.rounds.captions_at(positions)
        captions = np.zeros(len(counts), dtype=np.int64)
        known = counts[:, 0] >= 0
        if self._captions == "all":
            words = subkeys(self._keys(pass_index, "captions"), positions)
            for count in np.unique(counts[known, 0]).tolist():
                having = np.flatnonzero(counts[:, 0] == count)
                order = permutations(words[having], count)
                captions[having] = order[np.arange(len(having)), round_index[having]]
        elif counts.shape[1] > 1:
            words = subkeys(self._keys(passes, "fields"), positions)
            drawn = _draw_fields(words, counts, self.rounds.probabilities_at(positions))[:, None]
            captions = np.take_along_axis(np.cumsum(counts, axis=1) - counts, drawn, axis=1)[:, 0]
            counts = np.take_along_axis(counts, drawn, axis=1)
        if self._captions == "random":
            words = subkeys(self._keys(passes, "captions"), positions)
            captions += (words % np.maximum(counts[:, 0], 1).astype(np.uint64)).astype(np.int64)
        return np.where(known, captions, -1)

    def _keys(self, passes: np.ndarray, what: str) -> np.ndarray:
        """The key (n,) uint64 of something by (seed, source, pass)."""
        distinct, rows = np.unique(passes, return_inverse=True)
        return np.array([key(*self._name, number, what) for number in distinct.tolist()], np.uint64)[rows]

    def _fully_shuffled(
        self, pass_index: int, round_index: int, lane: np.ndarray, offset: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        positions, copies = self._whole(pass_index, round_index)
        return positions[offset], copies[offset]

    def _shuffle_whole(self, pass_index: int, round_index: int) -> tuple[np.ndarray, np.ndarray]:
        positions, copies = self.rounds.all_samples(round_index)
        order = permutation(key(*self._name, pass_index, round_index, "whole"), len(positions))
        return positions[order], copies[order]

    def _in_lanes(
        self, pass_index: int, round_index: int, lane: np.ndarray, offset: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        size = int(self.rounds.sizes[round_index])
        length, longer = divmod(size, self.lanes)
        along = lane * length + np.minimum(lane, longer)
        windows, within = np.divmod(offset, self._window)
        for window in np.unique(windows).tolist():
            rows = windows == window
            shuffled = self._windows(pass_index, round_index, window)
            along[rows] += window * self._window + shuffled[lane[rows], within[rows]]
        along = (along + key(*self._name, pass_index, round_index, "rotation") % size) % size
        return self.rounds.samples(round_index, *self._portions(pass_index, round_index).locate(along))

    def _order_portions(self, pass_index: int, round_index: int) -> "_PortionOrder":
        name = *self._name, pass_index, round_index
        return _PortionOrder(self.rounds, round_index, key(*name, "shards"), key(*name, "portions"))

    def _shuffle_window(self, pass_index: int, round_index: int, window: int) -> np.ndarray:
        """The shuffle of the offsets in a window of all lanes, (lanes, draws of the window) int32."""
        length, longer = divmod(int(self.rounds.sizes[round_index]), self.lanes)
        lengths = length + (np.arange(self.lanes) < longer) - window * self._window
        lengths = np.clip(lengths, 0, self._window)
        keys = subkeys(key(*self._name, pass_index, round_index, window, "window"), np.arange(self.lanes))
        orders = np.empty((self.lanes, lengths.max()), dtype=np.int32)
        for draws in np.unique(lengths).tolist():
            orders[lengths == draws, :draws] = permutations(keys[lengths == draws], draws)
        return orders


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
