"""Named numpy columns in one file that processes can map and share.

Layout: the magic `CLCOLUMN`, the header's length (8 bytes, little-endian), the header (JSON: `meta`, and
for every column its dtype, shape and offset), then the columns, each aligned to 64 bytes, little-endian.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"CLCOLUMN"
_ALIGNMENT = 64
# the dtypes that a file may hold, and their bytes: no objects, whatever its header says
_BYTES = {"|u1": 1, "<i4": 4, "<i8": 8}

Expected = Mapping[str, tuple[tuple[str, ...], tuple[int | None, ...]]]  # dtypes and shape (None: any length)


class BrokenColumns(Exception):
    """The file is not a whole file of columns."""


class Stream(NamedTuple):
    """A column that is written in chunks, because it may not fit in memory."""

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


def read_columns(path: Path, expected: Callable[[dict[str, Any]], Expected] | None = None) -> Columns:
    """Maps a file of columns, which may be anybody's: only plain integers within the file's bytes are mapped.

    `expected`, given the file's `meta`, says which columns there have to be, beside any others; it raises
    ValueError where the meta itself is none. Raises OSError if the file cannot be read, BrokenColumns if it
    is cut or foreign, or if an expected column is missing or of another dtype or shape.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(16)
        length = int.from_bytes(start[8:], "little")
        if start[:8] != MAGIC or 16 + length > size:
            raise BrokenColumns(f"{path} is not a clipcluster index")
        try:
            header = json.loads(file.read(length))
            meta, layout = header["meta"], header["columns"]
            if not isinstance(meta, dict):
                raise TypeError("meta is an object")
            found = {name: _found(column, size) for name, column in layout.items()}
            _require(found, {} if expected is None else expected(meta))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BrokenColumns(f"{path} is damaged ({error})") from None
        base = _aligned(16 + length)
        needed = base + max((column.end for column in found.values()), default=0)
        if needed > size:
            raise BrokenColumns(f"{path} is cut: {size} bytes of at least {needed}")
        # one mapping for all columns: each holds a file handle of its own
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {
        name: np.ndarray(column.shape, column.dtype, memory, base + column.offset)
        for name, column in found.items()
    }
    return Columns(meta, arrays)


class _Column(NamedTuple):
    """One column as a header describes it; `end` is the byte behind it, from where the columns begin."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    end: int


def _found(column: dict[str, Any], size: int) -> _Column:
    """The description of a column in a file of `size` bytes. ValueError, KeyError, TypeError: it is none."""
    dtype, shape, offset = column["dtype"], tuple(column["shape"]), column["offset"]
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise ValueError(f"{dtype!r} is no dtype of a column")
    if not 1 <= len(shape) <= 2 or not all(type(length) is int and 0 <= length <= size for length in shape):
        raise ValueError(f"{shape} is no shape of a column")
    if type(offset) is not int or offset < 0 or offset % _ALIGNMENT:
        raise ValueError(f"a column begins at {offset!r}")
    return _Column(dtype, shape, offset, offset + _BYTES[dtype] * math.prod(shape))


def _require(found: Mapping[str, _Column], expected: Expected) -> None:
    """KeyError where a column is missing, ValueError where it is of another dtype or shape."""
    for name, (dtypes, shape) in expected.items():
        column = found[name]
        fits = len(shape) == len(column.shape) and all(
            length in (None, there) for length, there in zip(shape, column.shape, strict=True)
        )
        if column.dtype not in dtypes or not fits:
            raise ValueError(f"column {name} is {column.dtype} {column.shape}")


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _bytes_of(array: np.ndarray | Stream) -> int:
    return int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize
