"""Samples of shards that others wrote, by number, in the order of their keys.

A table of a few bytes a sample is made by one header scan, so that millions can be read in any order and from
any process. A shard is a tar, or a folder with one file a member (img2dataset's output of files).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipcluster.data.shards.shard_index import IMAGE_EXTENSIONS, sample_name, samples
from clipcluster.data.shards.tar import NO_BYTES, BrokenTar, padded, read_at, scan

OPEN_SHARDS = 64  # handles kept open in each process

Label = Callable[[str, "Callable[[], bytes] | None"], bytes]


class Found(NamedTuple):
    """One sample of a scan: its bytes lie from `start` to `end`; `json` reads its json, if it has one."""

    key: str
    start: int
    end: int
    image_bytes: int  # -1: it has no image
    json: Callable[[], bytes] | None


class TarSamples:
    """The samples of several shards: shard by shard as given, by key within each.

    Attributes, all (n,): `keys` bytes, `shards` int32, `image_bytes` int64; `labels` (n, width) uint8, what
    `label(key, json)` said of each, of one width (None without `label`). `without_image` counts what was left
    out for that (with `images` False nothing is), `broken` says which shards end too early, and where.
    """

    def __init__(self, paths: Sequence[Path], *, label: Label | None = None, images: bool = True) -> None:
        self.paths = tuple(paths)
        self.without_image = 0
        self.broken: list[str] = []
        self._open: OrderedDict[int, _Tar | _Folder] = OrderedDict()
        pieces = [self._table(number, label, images) for number in range(len(self.paths))]
        self.keys: np.ndarray = _joined([piece[0] for piece in pieces], "S1")
        self.shards: np.ndarray = np.repeat(
            np.arange(len(pieces), dtype=np.int32), [len(piece[0]) for piece in pieces]
        )
        places: np.ndarray = _joined([piece[1] for piece in pieces], np.int64).reshape(-1, 3)
        self.starts, self.ends, self.image_bytes = (places[:, column].copy() for column in range(3))
        self.labels: np.ndarray | None = None
        if label is not None:
            self.labels = _joined([piece[2] for piece in pieces if len(piece[0])], np.uint8)

    def __len__(self) -> int:
        return len(self.starts)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def forget(self) -> None:
        """Gives up keys and labels, which only the choice of samples needs."""
        self.keys, self.labels = np.zeros(0, "S1"), None

    def read(self, number: int) -> tuple[str, dict[str, bytes]]:
        """Key and members (extension to bytes) of one sample. OSError where the disk fails."""
        shard = self._handle(int(self.shards[number]))
        return shard.read(int(self.starts[number]), int(self.ends[number]))

    def _table(
        self, number: int, label: Label | None, images: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys (n,), places (n, 3) and labels (n, width) of one shard, by key."""
        keys: list[bytes] = []
        places: list[tuple[int, int, int]] = []
        labels: list[bytes] = []
        shard = self._handle(number)
        try:
            for found in shard.samples():
                if images and found.image_bytes < 0:
                    self.without_image += 1
                    continue
                keys.append(found.key.encode("utf-8", "surrogateescape"))
                places.append((found.start, found.end, found.image_bytes))
                if label is not None:
                    labels.append(label(found.key, found.json))
        except BrokenTar as error:
            self.broken.append(f"{self.paths[number]}: {error}; its samples up to there are taken")
        order = np.argsort(np.array(keys, "S"), kind="stable") if keys else np.zeros(0, np.int64)
        said = (
            np.frombuffer(b"".join(labels), np.uint8).reshape(len(labels), -1) if labels else np.zeros((0, 0))
        )
        return (
            np.array(keys, "S")[order] if keys else np.zeros(0, "S1"),
            np.array(places, np.int64).reshape(-1, 3)[order],
            said[order] if labels else said.astype(np.uint8),
        )

    def _handle(self, number: int) -> _Tar | _Folder:
        """The open shard. Reads carry their own position, so that forked processes may share a handle."""
        shard = self._open.get(number)
        if shard is None:
            path = self.paths[number]
            shard = _Folder(path) if path.is_dir() else _Tar(path)
            self._open[number] = shard
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return shard


class _Tar:
    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        os.close(self._fd)

    def samples(self) -> Iterator[Found]:
        for key, named in samples(self._fd):
            members = {extension: member for extension, member in named.items() if member.size != NO_BYTES}
            if members:
                first, last = next(iter(members.values())), next(reversed(members.values()))
                end, json = last.offset + padded(last.size), members.get("json")
                read_json = json and partial(read_at, self._fd, json.offset, json.size)
                image = image_of(members)
                yield Found(key, first.start, end, -1 if image is None else members[image].size, read_json)

    def read(self, start: int, end: int) -> tuple[str, dict[str, bytes]]:
        key, members = "", {}
        for member in scan(self._fd, start):
            name = sample_name(member.name)
            if name is not None:
                key = name[0]
                members[name[1]] = read_at(self._fd, member.offset, member.size)
            if member.offset + padded(member.size) >= end:
                break
        return key, members


class _Folder:
    """A sample's place is its number among the folder's samples by key, and the next one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._samples: dict[str, dict[str, str]] = {}
        for file in sorted(os.listdir(path)):
            name = sample_name(file)
            if name is not None:
                self._samples.setdefault(name[0], {})[name[1]] = file
        self._keys = sorted(self._samples)

    def close(self) -> None:
        pass

    def samples(self) -> Iterator[Found]:
        for number, key in enumerate(self._keys):
            files = self._samples[key]
            json = (self._path / files["json"]).read_bytes if "json" in files else None
            image = image_of(files)
            size = -1 if image is None else (self._path / files[image]).stat().st_size
            yield Found(key, number, number + 1, size, json)

    def read(self, start: int, end: int) -> tuple[str, dict[str, bytes]]:
        key = self._keys[start]
        return key, {
            extension: (self._path / file).read_bytes() for extension, file in self._samples[key].items()
        }


def image_of(members: Iterable[str]) -> str | None:
    """Which of a sample's extensions is its image's; None if none is."""
    return next((extension for extension in members if extension in IMAGE_EXTENSIONS), None)


def _joined(pieces: Sequence[np.ndarray], dtype: object) -> np.ndarray:
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype)  # type: ignore[call-overload]
