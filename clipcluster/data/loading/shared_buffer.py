"""Memory for a batch's images that the loader's workers write into: no pixels are copied between processes.

The memory belongs to an anonymous file: nothing is left behind when processes are killed, and /dev/shm, which
containers keep small, is not used. A worker opens it through the descriptor of the process that made it.
"""

import math
import mmap
import os
from dataclasses import dataclass, replace

import torch

SHAREABLE = hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


@dataclass(frozen=True)
class BufferSlice:
    """Images `begin` to `end` of a shared buffer: a path and numbers, to be sent to another process."""

    path: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def cut(self, begin: int, end: int) -> "BufferSlice":
        """A slice of this slice, counted from its own begin."""
        return replace(self, begin=self.begin + begin, end=self.begin + end)

    def open(self) -> torch.Tensor:
        """The memory itself, (end - begin, *shape[1:]) uint8. OSError where the buffer's owner has ended."""
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return _mapped(fd, self.shape)[self.begin : self.end]
        finally:
            os.close(fd)


class SharedBuffer:
    """Memory for images, `shape` uint8, that other processes can open until this object is closed.

    `images` stays valid after that; `whole` is the slice of all of them.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._fd: int | None = None
        self._fd = os.memfd_create("batch", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, max(1, math.prod(shape)))
        self.images = _mapped(self._fd, shape)
        self.whole = BufferSlice(f"/proc/{os.getpid()}/fd/{self._fd}", shape, 0, shape[0])

    def close(self) -> None:
        """No other process can open it from now on; may be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    __del__ = close


def _mapped(fd: int, shape: tuple[int, ...]) -> torch.Tensor:
    size = math.prod(shape)
    if size == 0:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8).view(shape)
