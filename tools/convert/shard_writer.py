"""Writes shards: the same samples give the same bytes, and every shard is indexed as it is written.

A tar is built, hashed and written a megabyte at a time.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from clipcluster.data.shards import captions, indexing, shard_list
from clipcluster.data.shards.tar import BLOCK, END, header

_BUFFER = 1 << 20  # bytes built before they are written
_ZEROS = tuple(bytes(size) for size in range(BLOCK))
_LARGEST_OCTAL = 8**11 - 1
# A ustar header is: the path, what follows a path of this length up to the size, the size, the rest.
_AFTER_PATH = tuple(bytes(100 - length) + b"0000444\x000000000\x000000000\x00" for length in range(101))
_SIZES = tuple(b"%011o\0" % size for size in range(4096))
_TIME = b"00000000000\x00"
_TAIL = b"0".ljust(101, b"\0") + b"ustar\x0000".ljust(BLOCK - 257, b"\0")
_REST_SUM = sum(_TIME) + sum(b"        ") + sum(_TAIL) - 1  # 1: Adler-32 counts from one
_RESTS: dict[int, bytes] = {}  # by the checksum; there are some ten thousand at most


def header_parts(path: bytes, size: int) -> tuple[bytes, ...]:
    """The header of `clipcluster.data.shards.tar` in parts, many times faster for names that fit ustar."""
    if len(path) > 100 or size > _LARGEST_OCTAL or not path.isascii():
        return (header(path.decode("utf-8", "surrogateescape"), size),)
    front = path + _AFTER_PATH[len(path)] + (_SIZES[size] if size < 4096 else b"%011o\0" % size)
    # Adler-32's low half is 1 + the sum of the bytes, exact below 65521: 136 bytes of ASCII sum to less
    checksum = (zlib.adler32(front) & 0xFFFF) + _REST_SUM
    rest = _RESTS.get(checksum)
    if rest is None:
        rest = _RESTS[checksum] = b"%b%06o\0 %b" % (_TIME, checksum, _TAIL)
    return front, rest


class ShardFile:
    """One tar being written beside its final name; it appears there synced and indexed, or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.at = 0  # bytes so far: where the next member's header will begin
        self._aside = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.part")
        self._fd = os.open(self._aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._hash = hashlib.sha256()
        self._parts: list[bytes] = []
        self._flush_at = _BUFFER

    def put(self, name: bytes, data: bytes) -> int:
        """Adds a member; returns the offset of its bytes."""
        size = len(data)
        head = header_parts(name, size)
        length = BLOCK if len(head) == 2 else len(head[0])
        offset = self.at + length
        self._parts += (*head, data, _ZEROS[-size % BLOCK])
        self.at = offset + size + -size % BLOCK
        if self.at >= self._flush_at:
            self._flush()
        return offset

    def finish(self, columns: Mapping[str, np.ndarray]) -> shard_list.ShardEntry:
        """Ends, syncs, renames and indexes the tar; `columns`: see `indexing.write_entry`."""
        self._parts.append(END)
        self._flush()
        os.fsync(self._fd)
        os.close(self._fd)
        os.replace(self._aside, self.path)
        digest = self._hash.hexdigest()
        return indexing.write_entry(self.path, self.path.parent, (captions.DEFAULT,), digest, columns)

    def discard(self) -> None:
        """Removes what was written."""
        os.close(self._fd)
        self._aside.unlink(missing_ok=True)

    def _flush(self) -> None:
        data = b"".join(self._parts)
        self._parts.clear()
        self._flush_at = self.at + _BUFFER
        self._hash.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]
