"""Named numpy columns in one file that processes can map and share.

Layout: the magic `CLCOLUMN`, the header's length (8 bytes, little-endian), the header (JSON: `meta`, and
for every column its dtype, shape and offset), then the columns, each aligned to 64 bytes, little-endian.
"""

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"CLCOLUMN"
_ALIGNMENT = 64


class BrokenColumns(Exception):
    """The file is not a whole file of columns."""


class Columns(NamedTuple):
    """What a file of columns holds: `meta` as it was given, and the arrays, mapped read-only."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]


def write_columns(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes aside, syncs and renames: the file exists wholly or not at all."""
    ready = {
        name: np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
        for name, array in arrays.items()
    }
    layout: dict[str, Any] = {}
    at = 0
    for name, array in ready.items():
        layout[name] = {"dtype": array.dtype.str, "shape": list(array.shape), "offset": at}
        at += _aligned(array.nbytes)
    header = json.dumps({"meta": meta, "columns": layout}, ensure_ascii=False).encode()
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(aside, "wb") as file:
        file.write(MAGIC + len(header).to_bytes(8, "little") + header)
        file.write(bytes(_aligned(file.tell()) - file.tell()))
        for array in ready.values():
            file.write(array.tobytes())
            file.write(bytes(_aligned(array.nbytes) - array.nbytes))
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


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
