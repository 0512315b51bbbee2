"""Memory for a batch's images that the loader's workers write into, so that pixels are never copied between.

The memory belongs to an anonymous file: nothing is left when processes are killed, and it is no part of
/dev/shm, which containers make small. A worker opens it through the descriptor of the process that made it.
"""

import math
import mmap
import os
from dataclasses import dataclass, replace

import torch

SHAREABLE = hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


@dataclass(frozen=True)
class BufferSlice:
    """Images `begin` to `end` of a room, for another process: a path and numbers."""

    path: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def cut(self, begin: int, end: int) -> "BufferSlice":
        """A part of it, counted from its own begin."""
        return replace(self, begin=self.begin + begin, end=self.begin + end)

    def open(self) -> torch.Tensor:
        """The memory itself, (end - begin, *shape[1:]) uint8. OSError where the room's owner is gone."""
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return _mapped(fd, self.shape)[self.begin : self.end]
        finally:
            os.close(fd)


class SharedBuffer:
    """Images of a batch in memory that other processes can open while this object lives, `shape` uint8.

    `images` lives on without it.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._fd: int | None = None
        self._fd = os.memfd_create("batch", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, max(1, math.prod(shape)))
        self.images = _mapped(self._fd, shape)
        self.place = BufferSlice(f"/proc/{os.getpid()}/fd/{self._fd}", shape, 0, shape[0])

    def close(self) -> None:
        """No other process can open it any more; may be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    __del__ = close


def _mapped(fd: int, shape: tuple[int, ...]) -> torch.Tensor:
    size = math.prod(shape)
    if size == 0:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8).view(shape)
