"""Shards as they were indexed: opened, compared with their index, tried again. Imports no torch."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from clipcluster.data.shards import folder_index, shard_index
from clipcluster.data.shards.columns import BrokenColumns
from clipcluster.data.shards.folder_index import IndexedFolder
from clipcluster.data.shards.metadata import Metadata
from clipcluster.data.shards.tar import BrokenTar
from clipcluster.data.storage.urls import OtherContent, Refused, RemoteFile, RemoteFolder, State, Unreachable
from clipcluster.errors import UserError
from clipcluster.runs.files import file_sha256
from clipcluster.runtime.outcome import DataError

if TYPE_CHECKING:
    from clipcluster.data.storage.cache import Cache

CHECKED_SHARDS = 10_000  # more than these are compared only when a worker opens them
OPEN_SHARDS = 64  # file handles a source keeps open
RETRIES = (0.1, 1.0, 3.0)  # seconds to wait before another try at a disk that failed
TALKS = 16  # requests to a server at once


T = TypeVar("T")


class OpenShard(NamedTuple):
    """A shard that is open: its handle, the columns of its index and its bytes, which both agree on."""

    fd: int
    columns: dict[str, np.ndarray]
    size: int

    def image(self, row: int) -> tuple[int, int]:
        """Offset and size of an image, in bytes. BrokenColumns if they are outside the shard."""
        return self._within(row, "image_offset", "image_size")

    def text(self, row: int, choice: str) -> tuple[int, int]:
        """The same of the member that holds the captions of a choice."""
        return self._within(row, f"text_offset/{choice}", f"text_size/{choice}")

    def begin(self, row: int) -> int:
        """Offset of the first header of a sample, in bytes. BrokenColumns as `image`."""
        return self._within(row, "offset")[0]

    def _within(self, row: int, offset: str, size: str | None = None) -> tuple[int, int]:
        at, count = self.columns[offset].item(row), self.columns[size].item(row) if size else 0
        if at < 0 or count < 0 or at + count > self.size:
            raise BrokenColumns(f"sample {row} has {count} bytes at {at} of {self.size}")
        return at, count


class OpenShards(Metadata):
    """A source's shards. Files are opened on first use, `OPEN_SHARDS` at most at once.

    It can be sent to another process: paths travel and which bytes were compared, the index is mapped again
    there.
    """

    def __init__(
        self,
        folders: Sequence[IndexedFolder],
        probabilities: Sequence[float | None] = (None,),
        cache: Cache | None = None,
    ) -> None:
        super().__init__(folders, probabilities)
        self.cache = cache
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._hashed: set[tuple[int, int]] = set()  # shard and mtime of what was found to be the same bytes
        self._held: list[int] = []  # indexes in the cache, which evicts none that is in use
        fetched = [folder.index for folder in self.folders if folder.remote_index is not None]
        if fetched:
            from clipcluster.data.storage.cache import hold  # local shards need none of it

            self._held = [hold(index / folder_index.COLUMNS_FILE) for index in fetched]

    def __getstate__(self) -> dict[str, Any]:
        names = ("folders", "probabilities", "cache", "fingerprint", "_hashed")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        OpenShards.__init__(self, state["folders"], state["probabilities"], state["cache"])
        if self.fingerprint != state["fingerprint"]:
            raise DataError(f"the index of {self.folders[0].folder} was rebuilt while it was in use")
        self._hashed = state["_hashed"]

    def check_unchanged(self) -> None:
        """Compares size and mtime of every shard with the index, the hash where they differ.

        Raises DataError naming the first shard that is missing or has changed. A source of more than
        `CHECKED_SHARDS` shards is compared only shard by shard, when each is opened.
        """
        for shard in self.modified_shards():
            self.check(shard)

    def modified_shards(self) -> dict[int, int]:
        """The shards whose size or mtime (a remote one's stamp) is not the index's, each with what it is now.

        Of more than `CHECKED_SHARDS` none is looked at, nor what a command would print. Raises DataError for
        one that is missing, OSError where a server does not answer.
        """
        if len(self) > CHECKED_SHARDS:
            return {}
        remote = any(isinstance(indexed.folder, RemoteFolder) for indexed in self.folders)
        run = partial(in_threads, TALKS) if remote else map
        states = enumerate(run(self._state, range(len(self))))
        return {shard: state.stamp for shard, state in states if not self._is_as_indexed(shard, state)}

    def mark_unchanged(self, found: Mapping[int, int]) -> None:
        """Marks shards with these times or stamps as unchanged: another process compared their content."""
        self._hashed.update(found.items())

    def check(self, shard: int) -> None:
        """Compares one shard with the index, by its hash where the time differs. DataError if it changed."""
        state = self._state(shard)
        self._with_retries(shard, partial(self._compare, shard, state))

    def columns(self, shard: int) -> dict[str, np.ndarray]:
        """The index of a shard, which must match the index of its folder, else it raises DataError."""
        indexed = self.folder_of(shard)
        try:
            if indexed.remote_index is None:
                path = shard_index.shard_index_path(indexed.index, self.shard_name(shard))
                return self._matching(shard, path, path)
            file = indexed.remote_index / f"{self.shard_name(shard)}.idx"
            try:
                return self._fetched_columns(shard, file)
            except (BrokenColumns, DataError):  # a damaged one is fetched once more
                return self._fetched_columns(shard, file, again=True)
        except (BrokenColumns, FileNotFoundError) as error:
            raise self._damaged(shard, error) from None

    @property
    def remote_sizes(self) -> np.ndarray:
        """Bytes of the remote ones among the shards taken, (n,) int64."""
        by_folder = zip(self.folders, self._of_shards(["bytes"] * len(self.folders)), strict=True)
        sizes = [sizes for indexed, sizes in by_folder if isinstance(indexed.folder, RemoteFolder)]
        return np.concatenate([np.zeros(0, np.int64), *sizes])

    def check_cache_size(self, size: int) -> None:
        """UserError where a remote shard is larger than a cache of `size` bytes."""
        largest = int(self.remote_sizes.max(initial=0))
        if largest > size:
            raise UserError(
                f"{self.folders[0].folder}: its largest shard has {largest:,} bytes and the cache holds "
                f"{size:,}; set data.cache.size to several times the largest shard"
            )

    def close(self) -> None:
        """Closes the files that are open; reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1].fd)

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()
        for fd in getattr(self, "_held", ()):
            os.close(fd)

    def _handle(self, shard: int) -> OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        remote = self._is_remote(shard)
        fd = self._fetch(shard) if remote else os.open(self.shard_path(shard), os.O_RDONLY)
        try:
            state = os.fstat(fd)
            if not remote:
                self._compare(shard, State(state.st_size, state.st_mtime_ns))
            opened = OpenShard(fd, self.columns(shard), state.st_size)
        except BaseException:
            os.close(fd)
            raise
        while len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1].fd)
        self._open[shard] = opened
        return opened

    def _is_remote(self, shard: int) -> bool:
        return isinstance(self.folder_of(shard).folder, RemoteFolder)

    def _choices_at(self, shard: int) -> tuple[str, ...]:
        return self._choices_of(self._number_in_folder(shard)[0])

    def _indexed(self, shard: int) -> State:
        """The size and the mtime or stamp of a shard when it was indexed."""
        folder, number = self._number_in_folder(shard)
        arrays = self._tables[folder].arrays
        return State(int(arrays["bytes"][number]), int(arrays["mtime_ns"][number]))

    def _fetch(self, shard: int, *, again: bool = False) -> int:
        """A handle on a remote shard's bytes as they were indexed. DataError if they changed."""
        file, size = self.shard_location(shard), self._indexed(shard).size
        assert isinstance(file, RemoteFile)
        assert self.cache is not None
        assert size is not None
        try:
            return self.cache.shard(file.address, size, self.sha256(shard), again=again)
        except OtherContent as error:
            raise self._changed(shard, f" ({error})") from None

    def _fetched_columns(self, shard: int, file: RemoteFile, *, again: bool = False) -> dict[str, np.ndarray]:
        assert self.cache is not None
        key = f"{self.sha256(shard)} {self.folder_of(shard).index}"
        fd = self.cache.shard_index(file.address, key, again=again)
        try:
            return self._matching(shard, Path(f"/dev/fd/{fd}"), file)
        finally:
            os.close(fd)

    def _matching(self, shard: int, path: Path, shown: Path | RemoteFile) -> dict[str, np.ndarray]:
        """The columns of a shard's index, if they match the index of its folder, else DataError."""
        meta, arrays = shard_index.read_shard_index(path)
        if (
            meta["sha256"] != self.sha256(shard)
            or len(arrays["offset"]) != self.sample_counts[shard]
            or not set(self._choices_at(shard)) <= set(meta["choices"])
        ):
            raise DataError(f"{shown} does not match the index of its folder", self._advice(shard))
        return arrays

    def _state(self, shard: int) -> State:
        """Size and mtime of a shard, or its stamp by its server."""
        file = self.shard_location(shard)
        if isinstance(file, Path):
            state = self._with_retries(shard, partial(os.stat, file))
            return State(state.st_size, state.st_mtime_ns)
        from clipcluster.data.storage.download import state_of

        return self._with_retries(shard, partial(state_of, file.address))

    def _is_as_indexed(self, shard: int, state: State) -> bool:
        """By size and time or stamp, as far as both sides know one; one found to be the same will do."""
        known = self._indexed(shard)
        if state.size not in (None, known.size):
            return False
        if self._is_remote(shard) and (state.stamp == 0 or known.stamp >= 0):
            return True  # whatever is fetched is hashed
        return state.stamp == known.stamp or (shard, state.stamp) in self._hashed

    def _compare(self, shard: int, state: State) -> None:
        """DataError unless a shard in this state has the bytes that were indexed: the hash decides."""
        if self._is_as_indexed(shard, state):
            return
        if state.size not in (None, self._indexed(shard).size):
            raise self._changed(shard)
        if self._is_remote(shard):
            os.close(self._fetch(shard, again=True))
        elif file_sha256(self.shard_path(shard)) != self.sha256(shard):
            raise self._changed(shard)
        self._hashed.add((shard, state.stamp))

    def _changed(self, shard: int, how: str = "") -> DataError:
        words = f"shard {self.shard_location(shard)} changed since it was indexed{how}"
        return DataError(words, self._advice(shard))

    def _damaged(self, shard: int, error: Exception) -> DataError:
        words = f"the index of {self.shard_location(shard)} is damaged: {error}"
        return DataError(words, self._advice(shard))

    def _advice(self, shard: int) -> str:
        command = self.folder_of(shard).command
        return f"restore the shard, or index the folder again and start a new run: {command}"

    def _with_retries(self, shard: int, action: Callable[[], T]) -> T:
        """Tries again when the disk fails; a file that is gone or unlike its index: DataError."""
        for wait in (*RETRIES, None):
            try:
                return action()
            except BrokenTar:
                raise self._changed(shard) from None
            except BrokenColumns as error:
                raise self._damaged(shard, error) from None
            except (Unreachable, Refused):
                raise  # tried often enough
            except OSError as error:
                gone = isinstance(error, FileNotFoundError)
                if gone and (wait is None or self._is_remote(shard)):  # a server's answer is final
                    words = f"shard {self.shard_location(shard)} is missing"
                    raise DataError(words, self._advice(shard)) from None
                if wait is None:
                    words = f"{error.strerror or error} (tried {len(RETRIES) + 1} times)"
                    raise OSError(error.errno, words, str(self.shard_location(shard))) from error
                if shard in self._open:  # the next try opens it again
                    os.close(self._open.pop(shard).fd)
                time.sleep(wait)
        raise AssertionError("unreachable")


def in_threads(count: int, action: Callable[[int], T], shards: Sequence[int]) -> list[T]:
    """The results of `action`, so many at once; after an error no further one is begun."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(action, shards))
