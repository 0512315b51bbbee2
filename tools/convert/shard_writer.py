"""Writes shards: the same samples give the same bytes, and every shard is indexed as it is written.

A tar is built, hashed and written a megabyte at a time; a thread syncs, renames and indexes a shard that is
complete, while the next one is being built.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.data.shards import captions, indexing, shard_index, shard_list
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


class Behind:
    """A thread that does what it is given, in order, a few things behind the caller.

    After an error nothing more is done until `wait` has raised it.
    """

    def __init__(self, depth: int = 4) -> None:
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def do(self, action: Callable[[], None]) -> None:
        """Hands over an action; waits while too many are pending. Raises the error of an earlier one."""
        if self._error is not None:
            self.wait()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)
            self._thread.start()
        self._queue.put(action)

    def wait(self) -> None:
        """Returns once everything is done; raises the first error, once."""
        self._queue.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Ends the thread, after everything is done; raises nothing."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (action := self._queue.get()) is not None:
            try:
                if self._error is None:
                    action()
            except BaseException as error:
                self._error = error
            finally:
                self._queue.task_done()
        self._queue.task_done()


class ShardFile:
    """One tar being written beside its final name; it appears there synced and indexed, or not at all."""

    def __init__(self, path: Path, behind: Behind) -> None:
        self.path = path
        self.at = 0  # bytes so far: where the next member's header will begin
        self._behind = behind
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

    def close(
        self,
        columns: Callable[[], Mapping[str, np.ndarray]],
        complete: Callable[[shard_list.ShardEntry], None],
    ) -> None:
        """Ends the tar. In the thread: syncs, renames and indexes it, then calls `complete`.

        `columns` gives those of the shard's index, every sample of which has an image.
        """
        self._parts.append(END)
        self._flush()

        def finish() -> None:
            os.fsync(self._fd)
            self._close()
            rows = columns()
            os.replace(self._aside, self.path)
            digest = self._hash.hexdigest()
            complete(indexing.write_entry(self.path, self.path.parent, (captions.DEFAULT,), digest, rows))

        self._behind.do(finish)

    def discard(self) -> None:
        """Removes what was written. Call it with nothing pending in the thread."""
        self._close()
        self._aside.unlink(missing_ok=True)

    def _flush(self) -> None:
        data = b"".join(self._parts)
        self._parts.clear()
        self._flush_at = self.at + _BUFFER
        self._hash.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def check_key(key: str, extension: str) -> None:
    """ValueError for a key that readers of the tar could not tell from the extension again."""
    if "\0" in key or shard_index.sample_name(f"{key}.{extension}") != (key, extension):
        raise ValueError(f"{key!r} and {extension!r} cannot be told apart again in {key}.{extension}")


def json_member(texts: Sequence[str], fields: Mapping[str, Any]) -> bytes:
    """The bytes of `KEY.json`: the captions, then the fields. ValueError, TypeError: no JSON, no Unicode."""
    record = {"captions": list(texts), **fields}
    return json.dumps(record, ensure_ascii=False, separators=(", ", ": ")).encode()
