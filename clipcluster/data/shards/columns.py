"""Named numpy columns in one file that processes can map and share.

Layout: the magic `CLCOLUMN`, the header's length (8 bytes, little-endian), the header (JSON: `meta`, and
for every column its dtype, shape and offset), then the columns, each aligned to 64 bytes, little-endian.
"""

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"CLCOLUMN"
_ALIGNMENT = 64


class BrokenColumns(Exception):
    """The file is not a whole file of columns."""


class Stream(NamedTuple):
    """A column that is written piece by piece, because it need not fit in memory."""

    dtype: np.dtype
    shape: tuple[int, ...]
    chunks: Iterable[np.ndarray]


class Columns(NamedTuple):
    """What a file of columns holds: `meta` as it was given, and the arrays, mapped read-only."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]


def write_columns(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray | Stream]) -> None:
    """Writes aside, syncs and renames: the file exists wholly or not at all.

    ValueError where a stream gives more or less than its shape says.
    """
    layout: dict[str, Any] = {}
    at = 0
    for name, array in arrays.items():
        dtype = array.dtype.newbyteorder("<")
        layout[name] = {"dtype": dtype.str, "shape": list(array.shape), "offset": at}
        at += _aligned(_bytes_of(array))
    header = json.dumps({"meta": meta, "columns": layout}, ensure_ascii=False).encode()
    aside = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            file.write(MAGIC + len(header).to_bytes(8, "little") + header)
            file.write(bytes(_aligned(file.tell()) - file.tell()))
            for name, array in arrays.items():
                begin, size = file.tell(), _bytes_of(array)
                for chunk in array.chunks if isinstance(array, Stream) else (array,):
                    file.write(np.ascontiguousarray(chunk, array.dtype.newbyteorder("<")).tobytes())
                if file.tell() - begin != size:
                    raise ValueError(f"column {name} is {file.tell() - begin} bytes, not {size}")
                file.write(bytes(_aligned(size) - size))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def read_columns(path: Path) -> Columns:
    """Maps a file of columns. Raises OSError if it cannot be read, BrokenColumns if it is cut or foreign."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(16)
        length = int.from_bytes(start[8:], "little")
        if start[:8] != MAGIC or 16 + length > size:
            raise BrokenColumns(f"{path} is no index of clipcluster")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise BrokenColumns(f"{path} is damaged") from None
        base = _aligned(16 + length)
        # one mapping for all columns: each holds a file handle of its own
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays = {}
        for name, column in header["columns"].items():
            dtype, shape = np.dtype(column["dtype"]), tuple(column["shape"])
            end = base + column["offset"] + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            if end > size:
                raise BrokenColumns(f"{path} is cut: {size} bytes of at least {end}")
            arrays[name] = np.ndarray(shape, dtype, memory, base + column["offset"])
    return Columns(header["meta"], arrays)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _bytes_of(array: np.ndarray | Stream) -> int:
    return int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize


class Concatenated:
    """Columns laid end to end without copying them; a piece of several columns is their sum.

    Indexed as an array of one dimension is: by a number, a slice, an array of numbers or of booleans.
    """

    def __init__(self, pieces: Sequence[Sequence["np.ndarray | Concatenated"]]) -> None:
        self._pieces = [tuple(piece) for piece in pieces]
        self._ends = np.cumsum([len(piece[0]) for piece in self._pieces], dtype=np.int64)
        kinds = {column.dtype for piece in self._pieces for column in piece}
        summed = any(len(piece) > 1 for piece in self._pieces)
        self.dtype: np.dtype = kinds.pop() if len(kinds) == 1 and not summed else np.dtype(np.int32)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    @property
    def size(self) -> int:
        return len(self)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self._stretch(start, max(start, stop))[::step] if step > 0 else np.asarray(self)[key]
        numbers = np.asarray(key)
        if numbers.dtype == bool:
            numbers = np.flatnonzero(numbers)
        flat = np.where(numbers < 0, numbers + len(self), numbers).reshape(-1)
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

    def tolist(self) -> list[Any]:
        return self._stretch(0, len(self)).tolist()

    def max(self) -> int:
        """The largest value, one piece after the other. ValueError if there is none."""
        return max(int(values.max()) for values in self._values() if len(values))

    def min(self) -> int:
        """The smallest value, as `max`."""
        return min(int(values.min()) for values in self._values() if len(values))

    def sum(self, dtype: Any = None) -> int:
        """The sum of all values."""
        return sum(int(column.sum(dtype=np.int64)) for piece in self._pieces for column in piece)

    def _values(self) -> Iterator[np.ndarray]:
        return (self._of(number, slice(None)) for number in range(len(self._pieces)))

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
