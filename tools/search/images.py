"""The images of a folder, its own files and those in its shards, found without decoding any. No torch."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from clipcluster.data.images.format import kind_of, no_image
from clipcluster.data.shards.shard_index import IMAGE_EXTENSIONS, sample_name, scan_shard
from clipcluster.data.shards.tar import BrokenTar, Member, read_at, scan
from clipcluster.errors import UserError

_HEAD = 64  # bytes that suffice to recognise an image


class File(NamedTuple):
    """A file below the folder: its name from there, bytes, and time of modification (ns)."""

    name: str
    size: int
    mtime_ns: int


class Place(NamedTuple):
    """Where the bytes of an image are: a file, and in a shard its key; from `offset` on, `size` bytes."""

    file: str
    key: str
    offset: int
    size: int

    @property
    def shown(self) -> str:
        return f"{self.file} {self.key}".rstrip()


class Bad(NamedTuple):
    """An image that cannot be used, or a file of them (key ""), and why."""

    file: str
    key: str
    reason: str

    @property
    def shown(self) -> str:
        return f"{self.file} {self.key}".rstrip()


def files_of(folder: Path) -> tuple[list[File], list[Bad]]:
    """Every file below a folder by name, but hidden ones, and what cannot be looked into.

    Links to files are followed, links to folders are not. UserError where there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name one with image files or shards.")
    found: list[File] = []
    bad: list[Bad] = []

    def refused(error: OSError) -> None:
        name = Path(error.filename).relative_to(folder).as_posix()
        bad.append(Bad(name, "", f"cannot be read: {error.strerror}"))

    for parent, folders, names in os.walk(folder, onerror=refused):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if name.startswith("."):
                continue
            try:
                state = path.stat()
            except FileNotFoundError:  # removed meanwhile, or a link to nothing
                continue
            except OSError as error:
                refused(error)
                continue
            if stat.S_ISREG(state.st_mode):
                found.append(File(path.relative_to(folder).as_posix(), state.st_size, state.st_mtime_ns))
    return sorted(found), sorted(bad)


def images_in(folder: Path, name: str) -> tuple[list[Place], list[Bad]]:
    """The images of one file: itself, or those of a shard; a file of another kind has none and is not bad.

    Images are recognised by content. Raises OSError where the file cannot be read.
    """
    path = folder / name
    if name.endswith(".tar"):
        return _in_shard(path, name)
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if kind_of(head) is not None:
        return [Place(name, "", 0, path.stat().st_size)], []
    named_so = path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS
    return [], [Bad(name, "", no_image(head))] if named_so else []


def _in_shard(path: Path, name: str) -> tuple[list[Place], list[Bad]]:
    try:
        scanned = scan_shard(path, ())
    except UserError as error:  # compressed
        return [], [Bad(name, "", str(error))]
    columns, places = scanned.columns, []
    with open(path, "rb") as file:
        for begin, offset, size in zip(
            *(columns[column].tolist() for column in ("offset", "image_offset", "image_size")), strict=True
        ):
            member = next(_members(file.fileno(), begin), None)
            if member is None:
                raise OSError(errno.EIO, "it changed while it was read")  # so it is tried again
            key, _ = sample_name(member.name) or (member.name, "")
            places.append(Place(name, key, offset, size))
    return places, [] if scanned.broken is None else [Bad(name, "", scanned.broken)]


def _members(fd: int, begin: int) -> Iterator[Member]:
    with suppress(BrokenTar):
        yield from scan(fd, begin)


def bytes_at(folder: Path, place: Place) -> bytes:
    """The bytes of an image. OSError where the file is gone or shorter."""
    fd = os.open(folder / place.file, os.O_RDONLY)
    try:
        return read_at(fd, place.offset, place.size)
    finally:
        os.close(fd)
