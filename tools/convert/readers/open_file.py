"""A file that stays open, until nobody refers to it."""

import os
import weakref
from pathlib import Path

from clipcluster.data.shards.tar import read_at


class OpenFile:
    """A file or folder and its handle `fd`, which forked processes share: reads by offset move nothing.

    OSError if it cannot be opened.
    """

    def __init__(self, path: Path | str, flags: int = os.O_RDONLY) -> None:
        self.path = Path(path)
        self.fd = os.open(path, flags | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on. OSError where the disk fails or the file ends before."""
        try:
            return read_at(self.fd, offset, size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
