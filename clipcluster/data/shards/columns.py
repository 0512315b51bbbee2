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
_DTYPES = ("|u1", "<i4", "<i8")  # that a file may hold: no objects, whatever its header says


class BrokenColumns(Exception):
    """The file is not a whole file of columns; the message says why, and not which."""


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


def read_columns(
    path: Path, check: Callable[[dict[str, Any], dict[str, np.ndarray]], None] | None = None
) -> Columns:
    """Maps a file of columns, which may be anybody's: only plain integers within the file's bytes are mapped.

    `check(meta, arrays)` raises ValueError, KeyError or TypeError where they are not what they should be (see
    `require`). Raises OSError if the file cannot be read, BrokenColumns if it is cut, foreign, or refused.
    """
    with open(path, "rb") as file:
        start = file.read(16)
        length = int.from_bytes(start[8:], "little")
        if start[:8] != MAGIC or 16 + length > os.fstat(file.fileno()).st_size:
            raise BrokenColumns("it is not a clipcluster index")
        # one mapping for all columns: each holds a file handle of its own
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        header = json.loads(memory[16 : 16 + length])
        meta, base = header["meta"], _aligned(16 + length)
        if not isinstance(meta, dict):
            raise TypeError("meta is an object")
        arrays = {name: _mapped(memory, base, column) for name, column in header["columns"].items()}
        if check is not None:
            check(meta, arrays)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenColumns(str(error)) from None
    return Columns(meta, arrays)


def _mapped(memory: mmap.mmap, base: int, column: dict[str, Any]) -> np.ndarray:
    """The column that a header describes, counted from byte `base` on."""
    dtype, shape, offset = column["dtype"], tuple(column["shape"]), column["offset"]
    if dtype not in _DTYPES:
        raise ValueError(f"{dtype!r} is no dtype of a column")
    if not 1 <= len(shape) <= 2 or not all(type(n) is int and 0 <= n <= len(memory) for n in shape):
        raise ValueError(f"{shape} is no shape of a column")
    if type(offset) is not int or offset < 0 or offset % _ALIGNMENT:
        raise ValueError(f"a column begins at {offset!r}")
    needed = base + offset + np.dtype(dtype).itemsize * math.prod(shape)
    if needed > len(memory):
        raise ValueError(f"it is cut: {len(memory)} bytes of at least {needed}")
    return np.ndarray(shape, dtype, memory, base + offset)


def require(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], *dtypes: type) -> None:
    """KeyError where a column is missing, ValueError where it is of another dtype or shape."""
    column = arrays[name]
    if column.dtype not in dtypes or column.shape != shape:
        raise ValueError(f"column {name} is {column.dtype} {column.shape}")


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _bytes_of(array: np.ndarray | Stream) -> int:
    return int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize
