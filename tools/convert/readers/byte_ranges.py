"""Bytes of a file by offset, from any process: the file is opened on first use and never seeked in."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any


class ByteRanges:
    """A file that is read by offset. It may be pickled; a handle inherited by fork stays good, as pread moves
    nothing that processes share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on. OSError where the disk fails or the file ends before."""
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        data = os.pread(self._handle, size, offset)
        while len(data) < size:
            more = os.pread(self._handle, size - len(data), offset + len(data))
            if not more:
                reason = f"ends at byte {offset + len(data):,}, before {offset + size:,}"
                raise OSError(errno.EIO, reason, str(self.path))
            data += more
        return data

    def close(self) -> None:
        """Closes the handle; a later read opens it again."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_handle": None}
