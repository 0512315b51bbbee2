"""Shared buffers: memory for a batch's images, into which workers write without a copy between processes.

The memory is an anonymous file: nothing is left behind when processes are killed, and /dev/shm, which is
small in containers, is not used. A worker opens it through the descriptor of the process that made it.
"""

import math
import os
from dataclasses import dataclass, replace

import numpy as np
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
        images = torch.from_numpy(np.memmap(self.path, np.uint8, "r+", shape=self.shape))
        return images[self.begin : self.end]


class SharedBuffer:
    """Memory for images, `shape` uint8, that other processes can open until this object is closed.

    `images` stays valid after that; `whole` is the slice of all of them.
    """

    _fd: int | None = None

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._fd = os.memfd_create("batch", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, max(1, math.prod(shape)))
        self.whole = BufferSlice(f"/proc/{os.getpid()}/fd/{self._fd}", shape, 0, shape[0])
        self.images = self.whole.open()

    def close(self) -> None:
        """Close the file, so that no other process can open it; may be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    __del__ = close
