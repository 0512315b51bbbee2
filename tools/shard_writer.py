"""Writes shards: the same samples give the same bytes, and every shard is indexed as it is written."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from clipcluster.data import captions
from clipcluster.data import index as indexes
from clipcluster.data.tar import END, Member, header, padded


class ShardWriter:
    """Writes samples to `00000.tar`, `00001.tar`, … of a folder, each aside, synced, hashed and renamed.

    With the last shard closed by `finish`, the folder's index is complete. Leaving a `with` block by an
    exception writes no index and leaves no half shard under a final name.
    """

    def __init__(
        self, folder: Path, *, samples_per_shard: int = 10_000, captions_choice: str = captions.DEFAULT
    ) -> None:
        self.folder = folder
        self.samples_per_shard = samples_per_shard
        self.choice = captions_choice
        self.entries: list[indexes.ShardEntry] = []
        self._counts: list[np.ndarray] = []
        self._shard: _OpenShard | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif self._shard is not None:
            self._shard.discard()

    def add(
        self,
        key: str,
        image: bytes,
        extension: str,
        texts: list[str],
        *,
        fields: Mapping[str, Any] | None = None,
        cls: int | None = None,
    ) -> None:
        """Adds a sample: the image as it is, `KEY.json` (captions, then `fields`), `KEY.txt`, `KEY.cls`."""
        record = json.dumps(
            {"captions": texts, **(fields or {})}, ensure_ascii=False, separators=(", ", ": ")
        )
        members = {extension: image, "json": record.encode()}
        if texts:
            members["txt"] = texts[0].encode()
        if cls is not None:
            members["cls"] = str(cls).encode()
        self.add_members(key, members)

    def add_members(self, key: str, members: Mapping[str, bytes]) -> None:
        """Adds a sample of any members, by extension, in the order given. ValueError for a key with dots."""
        for extension in members:
            if indexes.sample_name(f"{key}.{extension}") != (key, extension):
                raise ValueError(f"{key!r} and {extension!r} cannot be told apart again in {key}.{extension}")
        if self._shard is None:
            self._shard = _OpenShard(self.folder / f"{len(self.entries):05d}.tar", self.choice)
        for extension, data in members.items():
            self._shard.write(f"{key}.{extension}", data)
        self._shard.samples += 1
        if self._shard.samples == self.samples_per_shard:
            self._close_shard()

    def finish(self) -> indexes.IndexSummary:
        """Closes the last shard and writes the folder's list."""
        if self._shard is not None:
            self._close_shard()
        indexes.write_list(self.folder, self.choice, self.entries, self._counts)
        return indexes.summary(self.folder, self.folder, self.choice, self.entries)

    def _close_shard(self) -> None:
        shard, self._shard = self._shard, None
        if shard is not None:
            entry, counts = shard.close(self.folder)
            self.entries.append(entry)
            self._counts.append(counts)


class _OpenShard:
    """A tar being written beside its final name."""

    def __init__(self, path: Path, choice: str) -> None:
        self.path = path
        self.samples = 0
        self._aside = path.with_name(f".{path.name}.part")
        self._file: BinaryIO = open(self._aside, "wb", buffering=1 << 20)  # noqa: SIM115
        self._hash = hashlib.sha256()
        self._rows = indexes.ShardRows(choice)
        self._at = 0

    def write(self, name: str, data: bytes) -> None:
        head = header(name, len(data))
        member = Member(name, self._at, self._at + len(head), len(data))
        self._rows.add(member, lambda: data)
        self._put(head)
        self._put(data)
        self._put(bytes(padded(len(data)) - len(data)))

    def close(self, index: Path) -> tuple[indexes.ShardEntry, np.ndarray]:
        self._put(END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._aside, self.path)
        columns = self._rows.finish()
        entry = indexes.write_rows(
            self.path, index, self._rows.choice, self._hash.hexdigest(), self._rows, columns
        )
        return entry, columns["captions"]

    def discard(self) -> None:
        self._file.close()
        self._aside.unlink(missing_ok=True)

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._at += len(data)
