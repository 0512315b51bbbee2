"""Columns of several folders concatenated without a copy."""

from collections.abc import Sequence
from typing import Any

import numpy as np


class Concatenated:
    """Columns concatenated without copying them; a piece of several columns is their sum.

    Indexed by a number, an array of numbers, or a slice without a step.
    """

    def __init__(self, pieces: Sequence[Sequence["np.ndarray | Concatenated"]]) -> None:
        self._pieces = [tuple(piece) for piece in pieces]
        self._ends = np.cumsum([len(piece[0]) for piece in self._pieces], dtype=np.int64)
        kinds = {column.dtype for piece in self._pieces for column in piece}
        summed = any(len(piece) > 1 for piece in self._pieces)
        self.dtype: np.dtype = kinds.pop() if len(kinds) == 1 and not summed else np.dtype(np.int32)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop, _ = key.indices(len(self))
            return self._stretch(start, stop)
        numbers = np.asarray(key)
        flat = numbers.reshape(-1)
        if len(flat) and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"a number is out of 0 to {len(self) - 1}")
        values = np.empty(len(flat), self.dtype)
        rows = np.searchsorted(self._ends, flat, side="right")
        for number in np.unique(rows).tolist():
            mine = rows == number
            values[mine] = self._of(number, flat[mine] - self._begin(number))
        return values.reshape(numbers.shape)[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self._stretch(0, len(self))
        return values if dtype is None else values.astype(dtype)

    def _begin(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0

    def _of(self, number: int, within: Any) -> np.ndarray:
        """The values of one piece at the places `within` it."""
        first, *others = self._pieces[number]
        values = first[within]
        for column in others:
            values = values.astype(np.int32) + column[within]
        return np.asarray(values)

    def _stretch(self, start: int, stop: int) -> np.ndarray:
        parts = [
            self._of(number, slice(max(start - self._begin(number), 0), stop - self._begin(number)))
            for number in range(len(self._pieces))
            if start < self._ends[number] and stop > self._begin(number)
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts).astype(self.dtype) if parts else np.zeros(0, self.dtype)
