"""Folders of shards, opened through their index and read by offset. Imports no torch.

A `Dataset` is one source: its samples are numbered 0 … n_samples - 1 in the order of the shards' names. It
can be sent to another process: paths travel and which bytes were compared, the index is mapped again there.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from clipcluster.data.shards import captions, folder_index, shard_index
from clipcluster.data.shards.columns import BrokenColumns, Columns
from clipcluster.data.shards.metadata import IndexedFolder, Metadata
from clipcluster.data.shards.tar import NO_BYTES, BrokenTar, read_at, scan
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
FETCHES = 4  # shards that one reader fetches at once


T = TypeVar("T")


class Sample(NamedTuple):
    """One sample of a shard: `image` holds the original bytes, `cls` is -1 if it has no class."""

    key: str
    shard: str
    image: bytes
    captions: list[str]
    cls: int


class _Open(NamedTuple):
    """A shard that is open: its handle, the columns of its index and its bytes, which both agree on."""

    fd: int
    columns: dict[str, np.ndarray]
    size: int

    def image(self, row: int) -> tuple[int, int]:
        """Offset and size of an image, in bytes. BrokenColumns if they are outside the shard."""
        return self._within(row, "image_offset", "image_size")

    def text(self, row: int, choice: str) -> tuple[int, int]:
        """The same of the member that holds the captions of a choice."""
        offset, size = (shard_index.caption_column(name, choice) for name in ("text_offset", "text_size"))
        return self._within(row, offset, size)

    def begin(self, row: int) -> int:
        """Offset of the first header of a sample, in bytes. BrokenColumns as `image`."""
        return self._within(row, "offset")[0]

    def _within(self, row: int, offset: str, size: str | None = None) -> tuple[int, int]:
        at, count = self.columns[offset].item(row), self.columns[size].item(row) if size else 0
        if at < 0 or count < 0 or at + count > self.size:
            raise BrokenColumns(f"sample {row} has {count} bytes at {at} of {self.size}")
        return at, count


class Dataset(Metadata):
    """A source of samples that can be read. Files are opened on first use, `OPEN_SHARDS` at most at once."""

    def __init__(
        self,
        folders: Sequence[IndexedFolder],
        probabilities: Sequence[float | None] = (None,),
        cache: Cache | None = None,
    ) -> None:
        super().__init__(folders, probabilities)
        self.cache = cache
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._hashed: set[tuple[int, int]] = set()  # shard and mtime of what was found to be the same bytes
        self._held = _held(self.folders)  # indexes in the cache, which evicts none that is in use

    def __getstate__(self) -> dict[str, Any]:
        return {
            "folders": self.folders,
            "probabilities": self.probabilities,
            "cache": self.cache,
            "fingerprint": self.fingerprint,
            "hashed": self._hashed,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        Dataset.__init__(self, state["folders"], state["probabilities"], state["cache"])
        if self.fingerprint != state["fingerprint"]:
            raise DataError(f"the index of {self.folders[0].folder} was rebuilt while it was in use")
        self._hashed = state["hashed"]

    def read(self, position: int, *, text: bool = True) -> Sample:
        """Reads one sample; without its captions if not `text`.

        Raises DataError if the shard is missing or has changed since it was indexed, OSError if the disk
        still fails after the retries.
        """
        shard, row = self.locate(position)
        return self._with_retries(shard, partial(self._read, shard, row, text))

    def _read(self, shard: int, row: int, text: bool) -> Sample:
        opened = self._handle(shard)
        with self._comparing(shard):
            member = next(scan(opened.fd, opened.begin(row)), None)
            if member is None:
                raise self._changed(shard)
            name = shard_index.sample_name(member.name)
            image = read_at(opened.fd, *opened.image(row))
            texts = self._captions(shard, opened, row) if text else []
        return Sample(
            name[0] if name else member.name, self.shard_name(shard), image, texts,
            opened.columns["class"].item(row),
        )  # fmt: skip

    def _captions(self, shard: int, opened: _Open, row: int) -> list[str]:
        """The captions of all fields, one field after the other."""
        found: list[str] = []
        for choice in self._choices_at(shard):
            kind, count = (
                opened.columns[shard_index.caption_column(name, choice)].item(row)
                for name in ("text_kind", "captions")
            )
            if kind != captions.NO_TEXT:
                texts = captions.texts(kind, read_at(opened.fd, *opened.text(row, choice)), choice)
                if len(texts) != count:
                    raise self._changed(shard)
                found += texts
        return found

    def read_members(self, position: int, extensions: Collection[str]) -> dict[str, bytes]:
        """The bytes of further members of a sample by extension, without those that it does not have.

        An extension is what follows the key's first dot, in lower case: `npz`, `paug.json`. Raises as `read`.
        """
        shard, row = self.locate(position)
        return self._with_retries(shard, partial(self._read_members, shard, row, extensions))

    def _read_members(self, shard: int, row: int, extensions: Collection[str]) -> dict[str, bytes]:
        opened = self._handle(shard)
        found: dict[str, bytes] = {}
        with self._comparing(shard):
            _, members = next(shard_index.samples(opened.fd, opened.begin(row)), ("", {}))
            for extension in extensions:
                member = members.get(extension)
                if member is not None and member.size != NO_BYTES:
                    found[extension] = read_at(opened.fd, member.offset, member.size)
        return found

    def begin(self, position: int) -> tuple[int, int]:
        """A handle on the shard of a sample, which stays this source's, and the byte where the sample begins.

        Raises as `read`.
        """
        shard, row = self.locate(position)
        if shard not in self._open:
            self._with_retries(shard, partial(self._handle, shard))
        with self._comparing(shard):
            opened = self._handle(shard)
            return opened.fd, opened.begin(row)

    def announce(self, positions: Iterable[int], *, members: bool = False) -> None:
        """Tells the kernel which images and captions will be read soon; with `members`, whole samples."""
        if not hasattr(os, "posix_fadvise"):
            return
        rows_of: dict[int, list[int]] = {}
        for position in positions:
            shard, row = self.locate(position)
            rows_of.setdefault(shard, []).append(row)
        self._fetch_ahead([shard for shard in rows_of if shard not in self._open])
        for shard, rows in rows_of.items():
            self._with_retries(shard, partial(self._announce, shard, rows, members))

    def _announce(self, shard: int, rows: Sequence[int], members: bool) -> None:
        opened, choices = self._handle(shard), self._choices_at(shard)
        with self._comparing(shard):
            for row in rows:
                begin = opened.begin(row)
                spans = [opened.image(row), *(opened.text(row, choice) for choice in choices)]
                end = max(map(sum, spans), default=begin)
                if members:  # they are between this sample's beginning and the next one's
                    last = row + 1 == len(opened.columns["offset"])
                    end = max(end, opened.size if last else opened.begin(row + 1))
                os.posix_fadvise(opened.fd, begin, max(1, end - begin), os.POSIX_FADV_WILLNEED)

    def _fetch_ahead(self, shards: Sequence[int]) -> None:
        """Brings the remote ones of several shards into the cache at once; opening them finds them there."""
        remote = [shard for shard in shards if self._is_remote(shard)]
        if len(remote) > 1:
            _in_threads(FETCHES, self._warm, remote)

    def _warm(self, shard: int) -> None:
        os.close(self._with_retries(shard, partial(self._fetch, shard)))

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
        remote = [shard for shard in range(len(self)) if self._is_remote(shard)]
        told = dict(zip(remote, _in_threads(TALKS, self._state, remote), strict=True))
        found = {}
        for shard in range(len(self)):
            state = told.get(shard) or self._state(shard)
            if not self._is_as_indexed(shard, state):
                found[shard] = state.stamp
        return found

    def mark_unchanged(self, found: Mapping[int, int]) -> None:
        """Marks shards with these times or stamps as unchanged: another process compared their content."""
        self._hashed.update(found.items())

    def check(self, shard: int) -> None:
        """Compares one shard with the index, by its hash where the time differs. DataError if it changed."""
        state = self._state(shard)
        self._with_retries(shard, partial(self._compare, shard, state))

    def close(self) -> None:
        """Closes the files that are open; reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1].fd)

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()
        for fd in getattr(self, "_held", ()):
            os.close(fd)

    def _handle(self, shard: int) -> _Open:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        remote = self._is_remote(shard)
        fd = self._fetch(shard) if remote else os.open(self.shard_path(shard), os.O_RDONLY)
        try:
            state = os.fstat(fd)
            if not remote:
                self._compare(shard, State(state.st_size, state.st_mtime_ns))
            opened = _Open(fd, self.columns(shard), state.st_size)
        except BaseException:
            os.close(fd)
            raise
        while len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1].fd)
        self._open[shard] = opened
        return opened

    def _is_remote(self, shard: int) -> bool:
        return isinstance(self._folder_of(shard).folder, RemoteFolder)

    def _choices_at(self, shard: int) -> tuple[str, ...]:
        return self._choices_of(self._number_in_folder(shard)[0])

    def _bytes_of(self, shard: int) -> int:
        """The size of a shard when it was indexed."""
        folder, number = self._number_in_folder(shard)
        return int(self._tables[folder].arrays["bytes"][number])

    def _fetch(self, shard: int, *, again: bool = False) -> int:
        """A handle on a remote shard's bytes as they were indexed. DataError if they changed."""
        file = self.shard_location(shard)
        assert isinstance(file, RemoteFile)
        assert self.cache is not None
        try:
            return self.cache.shard(file.address, self._bytes_of(shard), self.sha256(shard), again=again)
        except OtherContent as error:
            raise self._changed(shard, str(error)) from None

    def columns(self, shard: int) -> dict[str, np.ndarray]:
        """The index of a shard, which must match the index of its folder, else it raises DataError."""
        indexed = self._folder_of(shard)
        with self._comparing(shard):
            if indexed.remote_index is None:
                path = shard_index.shard_index_path(indexed.index, self.shard_name(shard))
                return self._matching(shard, shard_index.read_shard_index(path), path)
            assert self.cache is not None
            file = indexed.remote_index / f"{self.shard_name(shard)}.idx"
            key = f"{self.sha256(shard)} {indexed.index}"
            try:
                return self._fetched_columns(shard, self.cache, file, key)
            except (BrokenColumns, DataError):  # a damaged one is fetched once more
                self.cache.drop_shard_index(file.address, key)
                return self._fetched_columns(shard, self.cache, file, key)

    def _fetched_columns(self, shard: int, cache: Cache, file: RemoteFile, key: str) -> dict[str, np.ndarray]:
        fd = cache.shard_index(file.address, key)
        path = Path(f"/dev/fd/{fd}")
        try:
            return self._matching(shard, shard_index.read_shard_index(path), file)
        except BrokenColumns as error:
            raise BrokenColumns(str(error).replace(str(path), str(file))) from None
        finally:
            os.close(fd)

    def _matching(self, shard: int, index: Columns, path: Path | RemoteFile) -> dict[str, np.ndarray]:
        """The columns of a shard's index, if they match the index of its folder, else DataError."""
        if (
            index.meta["sha256"] != self.sha256(shard)
            or len(index.arrays["offset"]) != self.sample_counts[shard]
            or not set(self._choices_at(shard)) <= set(index.meta["choices"])
        ):
            raise DataError(f"{path} does not match the index of its folder", self._advice(shard))
        return index.arrays

    @property
    def remote_sizes(self) -> np.ndarray:
        """Bytes of the remote ones among the shards taken, (n,) int64."""
        by_folder = zip(self.folders, self._of_shards(["bytes"] * len(self.folders)), strict=True)
        sizes = [sizes for indexed, sizes in by_folder if isinstance(indexed.folder, RemoteFolder)]
        return np.concatenate(sizes) if sizes else np.zeros(0, np.int64)

    def check_cache_size(self, size: int) -> None:
        """UserError where a remote shard is larger than a cache of `size` bytes."""
        largest = int(self.remote_sizes.max(initial=0))
        if largest > size:
            raise UserError(
                f"{self.folders[0].folder}: its largest shard has {largest:,} bytes and the cache holds "
                f"{size:,}; set data.cache.size to several times the largest shard"
            )

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
        folder, number = self._number_in_folder(shard)
        if state.size not in (None, self._bytes_of(shard)):
            return False
        known = int(self._tables[folder].arrays["mtime_ns"][number])
        if self._is_remote(shard) and (state.stamp == 0 or known >= 0):
            return True  # whatever is fetched is hashed
        return state.stamp == known or (shard, state.stamp) in self._hashed

    def _compare(self, shard: int, state: State) -> None:
        """DataError unless a shard in this state has the bytes that were indexed: the hash decides."""
        if self._is_as_indexed(shard, state):
            return
        if state.size not in (None, self._bytes_of(shard)):
            raise self._changed(shard)
        if self._is_remote(shard):
            os.close(self._fetch(shard, again=True))
        elif file_sha256(self.shard_path(shard)) != self.sha256(shard):
            raise self._changed(shard)
        self._hashed.add((shard, state.stamp))

    def _changed(self, shard: int, how: str = "") -> DataError:
        told = f" ({how})" if how else ""
        return DataError(
            f"shard {self.shard_location(shard)} changed since it was indexed{told}", self._advice(shard)
        )

    @contextlib.contextmanager
    def _comparing(self, shard: int) -> Iterator[None]:
        """A shard and its index that do not fit each other are a DataError."""
        try:
            yield
        except BrokenTar:
            raise self._changed(shard) from None
        except (BrokenColumns, FileNotFoundError) as error:
            raise DataError(
                f"the index of {self.shard_location(shard)} is damaged: {error}", self._advice(shard)
            ) from None

    def _advice(self, shard: int) -> str:
        indexed = self._folder_of(shard)
        return (
            "restore the shard, or index the folder again and start a new run: "
            f"clipcluster shards index {indexed.folder}{indexed.index_option}"
        )

    def _with_retries(self, shard: int, action: Callable[[], T]) -> T:
        """Tries again when the disk fails; a file that stays away is a DataError."""
        for wait in (*RETRIES, None):
            try:
                return action()
            except (Unreachable, Refused):
                raise  # tried often enough
            except OSError as error:
                gone = isinstance(error, FileNotFoundError)
                if wait is None or (gone and self._is_remote(shard)):  # a server's answer is final
                    if gone:
                        raise DataError(
                            f"shard {self.shard_location(shard)} is missing", self._advice(shard)
                        ) from None
                    raise OSError(error.errno, f"{error.strerror or error} (tried {len(RETRIES) + 1} times)",
                                  str(self.shard_location(shard))) from error  # fmt: skip
                if shard in self._open:  # the next try opens it again
                    os.close(self._open.pop(shard).fd)
                time.sleep(wait)
        raise AssertionError("unreachable")


def _in_threads(count: int, action: Callable[[int], T], shards: Sequence[int]) -> list[T]:
    """The results of `action`, so many at once; after an error no further one is begun."""
    if not shards:
        return []
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(action, shards))


def _held(folders: Sequence[IndexedFolder]) -> list[int]:
    """Handles that keep the fetched indexes of these folders in the cache."""
    fetched = [folder.index for folder in folders if folder.remote_index is not None]
    if not fetched:
        return []
    from clipcluster.data.storage.cache import hold  # local shards need none of it

    return [hold(index / folder_index.COLUMNS_FILE) for index in fetched]
