"""Bytes of a file by offset, from any process: forked ones share the handle, as pread moves nothing."""

import os
import weakref
from pathlib import Path

from clipcluster.data.shards.tar import read_at


class ByteRanges:
    """A file that is read by offset. OSError if it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on. OSError where the disk fails or the file ends before."""
        try:
            return read_at(self._fd, offset, size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
