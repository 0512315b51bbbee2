"""The index of one shard, `SHARD.tar.idx`: where each sample's image and captions are.

Columns of every sample, each (samples,): `offset` (of its first header), `image_offset`, `image_size` (int64,
bytes), `class` (int32, -1: none). For each choice of captions, named `NAME/CHOICE`: `text_offset`,
`text_size` (int64, bytes), `text_kind` (uint8: NO_TEXT, JSON or TXT), `captions` (their number).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipcluster.data.shards import captions
from clipcluster.data.shards.columns import Columns, read_columns, require
from clipcluster.data.shards.tar import BLOCK, NO_BYTES, BrokenTar, Member, compression, read_at, scan
from clipcluster.errors import UserError

FORMAT = 2
IMAGE_EXTENSIONS = frozenset(
    ["jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm", "jp2", "img"]
)

_LARGEST_TEXT = 64 << 20  # bytes of a member that is looked into for captions
_ABOUT_THE_TAR = re.compile(r"(^|/)__[^/]*__($|/)")


def column_types(choices: Sequence[str]) -> dict[str, Any]:
    """The columns of a shard's index, and the dtype of each; of captions' numbers uint8 where they fit."""
    types = {"offset": np.int64, "image_offset": np.int64, "image_size": np.int64, "class": np.int32}
    of_captions = {
        "text_offset": np.int64,
        "text_size": np.int64,
        "text_kind": np.uint8,
        "captions": np.int32,
    }
    return types | {f"{name}/{choice}": own for choice in choices for name, own in of_captions.items()}


def sample_name(member: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member, split as WebDataset does; None if it belongs to no sample."""
    base = member.rfind("/") + 1
    dot = member.find(".", base)
    if dot <= base or ("__" in member and _ABOUT_THE_TAR.search(member)):
        return None
    return member[:dot], member[dot + 1 :].lower()


def samples(fd: int, start: int = 0) -> Iterator[tuple[str, dict[str, Member]]]:
    """Key and members by extension, links among them, of every sample from byte `start` on.

    A sample is a run of members with one key; an extension that comes again begins the next. BrokenTar, if
    the tar is broken, is raised behind the last sample.
    """
    key, members, broken = "", dict[str, Member](), None
    try:
        for member in scan(fd, start, links=True):
            name = sample_name(member.name)
            if name is None:
                continue
            if name[0] != key or name[1] in members:
                if members:
                    yield key, members
                key, members = name[0], {}
            members[name[1]] = member
    except BrokenTar as error:
        broken = error
    if members:
        yield key, members
    if broken is not None:
        raise broken


class Scanned(NamedTuple):
    """The index of one shard: its columns, each (samples,), and what is no sample of it.

    `without_image` counts the samples without an image, `duplicates` those of a key that was used before:
    samples, these and those are all there are. `broken` is why the tar ends early, or None.
    """

    columns: dict[str, np.ndarray]
    without_image: int
    duplicates: int
    broken: str | None


def scan_shard(path: Path, choices: Sequence[str]) -> Scanned:
    """Indexes a tar: its headers, and its small members. UserError: it is compressed."""
    rows: list[tuple[int, ...]] = []
    keys: set[str] = set()
    without_image, duplicates, broken = 0, 0, None
    with open(path, "rb") as file:
        fd = file.fileno()
        try:
            for key, members in samples(fd):
                readable = [name for name in members if members[name].size != NO_BYTES]
                images = [name for name in readable if name in IMAGE_EXTENSIONS]
                if key in keys:
                    duplicates += 1
                elif not images:
                    without_image += 1
                else:
                    keys.add(key)
                    start, image = members[readable[0]].start, members[images[0]]
                    texts = _texts(fd, members, choices)
                    rows.append((start, image.offset, image.size, _class(fd, members), *texts))
        except BrokenTar as error:
            broken = str(error)
        packed = compression(fd) if broken and not rows else None
    if packed:
        raise UserError(
            f"{path} is compressed with {packed}, whatever its name says, and cannot be read by offset; "
            "unpack it to a plain .tar first"
        )
    types = column_types(choices)
    values = zip(*rows, strict=True) if rows else repeat((), len(types))
    columns = {
        name: np.array(numbers, dtype) for (name, dtype), numbers in zip(types.items(), values, strict=True)
    }
    return Scanned(columns, without_image, duplicates, broken)


def _texts(fd: int, members: Mapping[str, Member], choices: Sequence[str]) -> list[int]:
    """Offset, size, kind and number of the captions, for each choice in turn."""
    found: list[int] = []
    parsed: dict[str, Any] = {}
    for choice in choices:
        row = (0, 0, captions.NO_TEXT, 0)
        for kind, extension in captions.members_of(choice):
            member = members.get(extension)
            if member is None or not NO_BYTES < member.size <= _LARGEST_TEXT:
                continue
            if extension not in parsed:
                parsed[extension] = captions.parsed(kind, read_at(fd, member.offset, member.size))
            count = len(captions.texts(kind, parsed[extension], choice))
            if count:
                row = (member.offset, member.size, kind, count)
                break
        found += row
    return found


def _class(fd: int, members: Mapping[str, Member]) -> int:
    """The decimal number in `cls`, or -1."""
    member = members.get("cls")
    if member is None or not NO_BYTES < member.size <= BLOCK:
        return -1
    text = read_at(fd, member.offset, member.size).strip()
    return int(text) if text.isdigit() and len(text) < 10 else -1


def shard_index_path(folder: Path, shard: str) -> Path:
    """The file of one shard's index."""
    return folder / f"{shard}.idx"


def read_shard_index(path: Path) -> Columns:
    """The columns of one shard, each (samples,), and in `meta` its `sha256` and the `choices` of captions.

    OSError if the file cannot be read; BrokenColumns if it is damaged, or of another format.
    """
    return read_columns(path, _check)


def _check(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    choices = meta["choices"]
    if meta["format"] != FORMAT or not isinstance(meta["sha256"], str) or not isinstance(choices, list):
        raise ValueError(f"format {meta['format']!r}, not {FORMAT}")
    for name, dtype in column_types(choices).items():
        smaller = (np.uint8,) if name.startswith("captions/") else ()
        require(arrays, name, (len(arrays["offset"]),), dtype, *smaller)
