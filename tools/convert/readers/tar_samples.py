"""Samples of shards that others wrote, by number, in the order of their keys; and what their members say.

A table of a few bytes a sample is made by one header scan, so that millions can be read in any order and from
any process. A shard is a tar, or a folder with one file a member (img2dataset's output of files).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipcluster.data.shards.shard_index import IMAGE_EXTENSIONS, sample_name, samples
from clipcluster.data.shards.tar import NO_BYTES, BrokenTar, padded, scan
from tools.convert.readers.open_file import OpenFile
from tools.convert.records import BadRecord, Record

_OPEN_SHARDS = 64  # at most, in each process

Label = Callable[[str, "bytes | None"], bytes]


class Found(NamedTuple):
    """One sample of a scan: its bytes lie from `start` to `end`; `json` reads its json, if it has one."""

    key: str
    start: int
    end: int
    image_bytes: int  # -1: it has no image
    json: Callable[[], bytes] | None


class TarSamples:
    """The samples of several shards: shard by shard as given, by key within each.

    Attributes, all (n,): `keys` bytes, `shards` int32, `image_bytes` int64; `labels` bytes, what `label(key,
    json)` said of each (empty: nothing, or no `label`). Samples without an image are left out (with `images`
    False none is); `notes` say how many, and which shards end too early, and where.
    """

    def __init__(self, paths: Sequence[Path], *, label: Label | None = None, images: bool = True) -> None:
        self.paths = tuple(paths)
        self.notes: list[str] = []
        self._without_image = 0
        self._shard = lru_cache(_OPEN_SHARDS)(self._open)
        pieces = [self._table(number, label, images) for number in range(len(self.paths))]
        keys, places, labels = zip(*pieces, strict=True)
        self.keys: np.ndarray = np.concatenate(keys)
        self.labels: np.ndarray = np.concatenate(labels)
        self.shards = np.repeat(np.arange(len(pieces), dtype=np.int32), list(map(len, keys)))
        self.starts, self.ends, self.image_bytes = np.ascontiguousarray(np.concatenate(places).T)
        if self._without_image:
            self.notes.append(f"{self._without_image:,} samples without an image are left out")

    def __len__(self) -> int:
        return len(self.starts)

    def forget(self) -> None:
        """Gives up keys and labels, which only the choice of samples needs."""
        self.keys = self.labels = np.zeros(0, "S1")

    def read(self, number: int) -> tuple[str, dict[str, bytes]]:
        """Key and members (extension to bytes) of one sample. OSError where the disk fails."""
        shard = self._shard(int(self.shards[number]))
        return shard.read(int(self.starts[number]), int(self.ends[number]))

    def _table(
        self, number: int, label: Label | None, images: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys (n,), places (n, 3) and labels (n,) of one shard, by key."""
        rows: list[tuple[bytes, tuple[int, int, int], bytes]] = []
        try:
            for found in self._shard(number).samples():
                if images and found.image_bytes < 0:
                    self._without_image += 1
                    continue
                said = label(found.key, found.json and found.json()) if label else b""
                place = found.start, found.end, found.image_bytes
                rows.append((found.key.encode("utf-8", "surrogateescape"), place, said))
        except BrokenTar as error:
            self.notes.append(f"{self.paths[number]}: {error}; its samples up to there are taken")
        rows.sort(key=itemgetter(0))
        places = np.array([place for _, place, _ in rows], np.int64).reshape(-1, 3)
        return (
            np.array([key for key, _, _ in rows], "S"),
            places,
            np.array([said for _, _, said in rows], "S"),
        )

    def _open(self, number: int) -> _Tar | _Folder:
        path = self.paths[number]
        return _Folder(path) if path.is_dir() else _Tar(OpenFile(path))


@dataclass
class _Tar:
    file: OpenFile

    def samples(self) -> Iterator[Found]:
        for key, named in samples(self.file.fd):
            members = {extension: member for extension, member in named.items() if member.size != NO_BYTES}
            if members:
                first, last = next(iter(members.values())), next(reversed(members.values()))
                end, json = last.offset + padded(last.size), members.get("json")
                read_json = json and partial(self.file.read, json.offset, json.size)
                image = image_of(members)
                yield Found(key, first.start, end, -1 if image is None else members[image].size, read_json)

    def read(self, start: int, end: int) -> tuple[str, dict[str, bytes]]:
        key, members = "", {}
        for member in scan(self.file.fd, start):
            name = sample_name(member.name)
            if name is not None:
                key = name[0]
                members[name[1]] = self.file.read(member.offset, member.size)
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


def tars_of(folder: Path) -> list[Path]:
    """The tars in a folder, in the order of their names."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def image_of(members: Iterable[str]) -> str | None:
    """Which of a sample's extensions is its image's; None if none is."""
    return next((extension for extension in members if extension in IMAGE_EXTENSIONS), None)


def record_of(key: str, members: dict[str, bytes], caption_field: str | None = None) -> Record:
    """A sample of image, txt, json and cls; other members stay members. BadRecord if one cannot be read.

    Captions are the json's `caption_field` if one is named; else its `captions` if that is a list, else txt,
    else what the json says under `caption`.
    """
    rest = dict(members)
    extension = image_of(members)
    if extension is None:
        raise BadRecord(key, "no image")
    image = rest.pop(extension)
    try:
        fields = json.loads(rest.pop("json", b"{}"))
    except (ValueError, RecursionError):
        raise BadRecord(key, "its json cannot be read") from None
    if not isinstance(fields, dict):
        raise BadRecord(key, "its json is not an object")
    texts = _captions(key, fields, rest.pop("txt", b""), caption_field)
    fields.pop("captions", None)
    cls = rest.pop("cls", b"").strip()
    return Record(key, image, texts, fields, int(cls) if cls.isdigit() and len(cls) < 10 else None, rest)


def _captions(key: str, fields: Mapping[str, Any], txt: bytes, field: str | None) -> list[str]:
    value = fields.get(field or "captions")
    if field is None and not isinstance(value, list):
        try:
            value = txt.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRecord(key, "its txt is not UTF-8") from None
        value = value if value.strip() else fields.get("caption")
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]
