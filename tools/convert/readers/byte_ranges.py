"""Bytes of a file by offset, from any process: the file is opened on first use and never seeked in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from clipcluster.data.shards.tar import read_at


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
        try:
            return read_at(self._handle, offset, size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def close(self) -> None:
        """Closes the handle; a later read opens it again."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_handle": None}
