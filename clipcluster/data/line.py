"""The line of one source (or of several laid together): which sample is drawn when, pass after pass.

A pass is its rounds one after the other. A round is laid out in one of two ways:

- small sources: all its samples are permuted whole;
- large ones: its shards are permuted, their samples laid end to end and rotated, the line is cut into L lanes
  whose lengths differ by one at most, and draw v is place v div L of lane v mod L, shuffled within the lane's
  windows. So a batch reads from L places of the data at once, each moving on slowly.

Everything is computed from (seed, source, pass, round) when it is reached; what is kept can be made again.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from clipcluster.data.permutation import key, permutation, permutations, subkeys
from clipcluster.data.rounds import Rounds


@dataclass(frozen=True, eq=False)
class Places:
    """Where draws fall in a line, arrays (n,) int64: pass, round ("turn"), lane, place within the lane."""

    passage: np.ndarray
    turn: np.ndarray
    lane: np.ndarray
    place: np.ndarray

    def __getitem__(self, rows: slice | np.ndarray) -> "Places":
        return Places(self.passage[rows], self.turn[rows], self.lane[rows], self.place[rows])


class Line:
    """The line of `rounds` under (seed, number), drawn `per_batch` (roughly) at a time.

    whole: permute each round whole. pass_draws: draws of one pass, the round sizes' sum or less.
    lanes: an upper bound of the lanes; `.lanes` is what is used.
    """

    def __init__(
        self,
        rounds: Rounds,
        *,
        seed: int,
        number: int,
        per_batch: int,
        pass_draws: int,
        lanes: int,
        window: int,
        whole: bool,
    ) -> None:
        self.rounds = rounds
        self.pass_draws = pass_draws
        self.lanes = 1 if whole else count_lanes(per_batch, lanes)
        self._name = (seed, number)
        self._window = window
        self._whole = whole
        self._ends = np.cumsum(rounds.sizes)
        # a batch may touch two passes or rounds, seldom more
        self._laid = Recent(2)
        self._windows = Recent(4)

    def places(self, numbers: np.ndarray) -> Places:
        """Places of the draws `numbers` (n,) int64 of this line, in order of (pass, round, lane, place)."""
        passage, time = numbers // self.pass_draws, numbers % self.pass_draws
        turn = np.zeros_like(time)
        if len(self._ends) > 1:
            time = (time + self._first_draws(passage)) % self._ends[-1]
            turn = np.searchsorted(self._ends, time, side="right")
            time -= self._ends[turn] - self.rounds.sizes[turn]
        place, lane = np.divmod(time, self.lanes)
        return Places(passage, turn, lane, place)[np.lexsort((place, lane, turn, passage))]

    def positions(self, places: Places) -> np.ndarray:
        """Positions (n,) int64 of the samples at `places`, counted over all sources of the line."""
        positions = np.empty(len(places.place), dtype=np.int64)
        for passage, turn, rows in _stretches_of_equals(places.passage, places.turn):
            mine = places[rows]
            positions[rows] = (self._in_whole if self._whole else self._in_lanes)(passage, turn, mine)
        return positions

    def captions(self, places: Places, positions: np.ndarray, counts: np.ndarray, choice: str) -> np.ndarray:
        """Which of its captions (n,) int32 each sample shows; -1 where `counts` (n,) is -1, not known.

        choice "first": the first; "random": one by (seed, source, pass, sample); "all": the round's in a
        permutation of the sample's captions by the same.
        """
        if choice == "first":
            return np.where(counts < 0, -1, 0).astype(np.int32)
        captions = np.full(len(positions), -1, dtype=np.int32)
        known = counts > 0
        for passage, _, rows in _stretches_of_equals(places.passage):
            of_samples = subkeys(key(*self._name, passage, "captions"), positions[rows])
            if choice == "random":
                drawn = of_samples % np.maximum(counts[rows], 1).astype(np.uint64)
                captions[rows] = np.where(known[rows], drawn.astype(np.int32), -1)
                continue
            for count in np.unique(counts[rows][known[rows]]).tolist():
                having = np.flatnonzero(counts[rows] == count)
                order = permutations(of_samples[having], count)
                captions[rows][having] = order[np.arange(len(having)), places.turn[rows][having]]
        return captions

    def _first_draws(self, passage: np.ndarray) -> np.ndarray:
        """How far into its rounds each draw's pass begins (n,); else the cut always hit the last round."""
        firsts = np.empty_like(passage)
        for number, _, rows in _stretches_of_equals(passage):
            firsts[rows] = key(*self._name, number, "first draw") % int(self._ends[-1])
        return firsts

    def _in_whole(self, passage: int, turn: int, places: Places) -> np.ndarray:
        def lay() -> np.ndarray:
            samples = self.rounds.all_positions(turn)
            return samples[permutation(key(*self._name, passage, turn, "whole"), len(samples))]

        return self._laid.get((passage, turn), lay)[places.place]

    def _in_lanes(self, passage: int, turn: int, places: Places) -> np.ndarray:
        def lay() -> tuple[np.ndarray, np.ndarray]:
            counts = self.rounds.counts[turn]
            narrow = np.int32 if len(counts) <= np.iinfo(np.int32).max else np.int64
            shards = permutation(key(*self._name, passage, turn, "shards"), len(counts)).astype(narrow)
            return shards, np.cumsum(counts[shards], dtype=np.int64)

        shards, ends = self._laid.get((passage, turn), lay)
        size = int(self.rounds.sizes[turn])
        length, longer = divmod(size, self.lanes)
        starts = places.lane * length + np.minimum(places.lane, longer)
        rotation = key(*self._name, passage, turn, "rotation") % size
        along = (starts + self._shuffled(passage, turn, places, size) + rotation) % size
        rows = np.searchsorted(ends, along, side="right")
        here = shards[rows]
        return self.rounds.positions(turn, here, along - (ends[rows] - self.rounds.counts[turn, here]))

    def _shuffled(self, passage: int, turn: int, places: Places, size: int) -> np.ndarray:
        """Places within their lanes after the shuffle in windows, (n,)."""
        windows, within = np.divmod(places.place, self._window)
        shuffled = windows * self._window
        for window in np.unique(windows).tolist():
            rows = np.flatnonzero(windows == window)

            def lay(window: int = window) -> _Window:
                parent = key(*self._name, passage, turn, window, "window")
                return _Window(parent, size, self.lanes, self._window, window)

            laid = self._windows.get((passage, turn, window), lay)
            shuffled[rows] += laid.shuffled(places.lane[rows], within[rows])
        return shuffled


class _Window:
    """Window number `window` of all lanes of a round: each lane's shuffle is made when first asked for."""

    def __init__(self, parent: int, size: int, lanes: int, length: int, window: int) -> None:
        self._parent = parent
        lane_lengths = size // lanes + (np.arange(lanes) < size % lanes)
        self._lengths = np.clip(lane_lengths - window * length, 0, length)
        self._made = np.zeros(lanes, dtype=bool)
        self._orders = np.empty((lanes, int(self._lengths.max())), dtype=np.int32)

    def shuffled(self, lanes: np.ndarray, within: np.ndarray) -> np.ndarray:
        """Place in the window (n,) that the draw `within` (n,) of its lane `lanes` (n,) shows."""
        if not self._made[lanes].all():
            missing = np.unique(lanes[~self._made[lanes]])
            for length in np.unique(self._lengths[missing]).tolist():
                alike = missing[self._lengths[missing] == length]
                self._orders[alike, :length] = permutations(subkeys(self._parent, alike), length)
            self._made[missing] = True
        return self._orders[lanes, within]


class Recent:
    """The last few things made, by key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._things: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """The thing called `name`, made by `make` unless it is among the last few asked for."""
        if name not in self._things:
            while len(self._things) >= self._most:  # before making: never one more than `most` in memory
                self._things.popitem(last=False)
            self._things[name] = make()
        self._things.move_to_end(name)
        return self._things[name]


def count_lanes(per_batch: int, most: int) -> int:
    """The largest divisor of `per_batch` not above `most`, so that every batch draws alike from each lane.

    Where that divisor is below half of what is possible (a batch size of 2 x 509), as many as are possible:
    the lanes then wander over the ranks, but a batch does not come from two shards.
    """
    possible = min(most, per_batch)
    largest = next(number for number in range(possible, 0, -1) if per_batch % number == 0)
    return largest if 2 * largest > possible else possible


def _stretches_of_equals(
    first: np.ndarray, second: np.ndarray | None = None
) -> Iterator[tuple[int, int, slice]]:
    """Each stretch of draws with one value in both arrays (sorted by them): the two values and the slice."""
    if not len(first):
        return
    changes = np.diff(first) != 0
    if second is not None:
        changes |= np.diff(second) != 0
    bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(first)]
    for start, stop in pairwise(bounds):
        yield int(first[start]), 0 if second is None else int(second[start]), slice(start, stop)
