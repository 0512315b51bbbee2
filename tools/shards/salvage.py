"""A damaged tar made sound: its whole samples in a new one, the original kept beside it."""

import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple

from clipcluster.data.shards.shard_index import sample_name, samples
from clipcluster.data.shards.tar import BLOCK, END, NO_BYTES, BrokenTar, Member, padded, read_at, scan

ASIDE = ".broken"  # what the original's name gets
_MAGIC = 257  # where `ustar` stands in a header


class Salvaged(NamedTuple):
    """What became of a damaged tar: how many samples are in the sound one, and which were left out."""

    original: Path
    kept: int
    left_out: list[str]


class _Found(NamedTuple):
    """A sample of a damaged tar, and whether it is whole; None: next to the damage, decided by comparison."""

    key: str
    members: Mapping[str, Member]
    whole: bool | None


def salvage(path: Path) -> Salvaged | None:
    """Replaces a damaged tar by a sound one of its whole samples; None, and nothing done, if none is whole.

    The original stays beside it as NAME.broken (.broken.2, … if there is one already). A sample next to the
    damage is whole if it has the members that others of the shard have. Members of no sample are left out.
    """
    kept, left_out = [], []
    aside = path.with_name(f".{path.name}.part")
    with open(path, "rb") as source:
        fd = source.fileno()
        found = list(_found(fd))
        usual = {frozenset(sample.members) for sample in found if sample.whole}
        for sample in found:
            if sample.whole or (sample.whole is None and frozenset(sample.members) in usual):
                kept.append(sample)
            else:
                left_out.append(sample.key)
        if not kept:
            return None
        try:
            with open(aside, "wb") as file:
                for sample in kept:
                    for _, start, offset, size in sample.members.values():
                        data = read_at(fd, start, offset + size - start)
                        file.write(data.ljust(padded(len(data)), b"\0"))
                file.write(END)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    original = _keep(path)
    os.replace(aside, path)
    return Salvaged(original, len(kept), left_out)


def _found(fd: int) -> Iterator[_Found]:
    """The samples between the damaged places, and those whose beginning alone is known."""
    start: int | None = 0
    while start is not None:
        stretch, end, damaged = list[_Found](), start, False
        try:
            for key, members in samples(fd, start):
                end = max(member.offset + padded(member.size) for member in members.values())
                whole = None if 0 < start == next(iter(members.values())).start else True
                readable = {name: member for name, member in members.items() if member.size != NO_BYTES}
                stretch.append(_Found(key, readable, whole))
        except BrokenTar:
            damaged, known = True, end
            with suppress(BrokenTar):
                for member in scan(fd, known):  # of no sample: what they follow is whole
                    end = member.offset + padded(member.size)
        cut = sample_name(_name_at(fd, end) or "") if damaged else None
        if damaged and stretch and end == known:
            last = stretch[-1]
            whole = False if cut is not None and cut[0] == last.key else None
            stretch[-1] = last._replace(whole=whole)
        yield from stretch
        if cut is not None and (not stretch or cut[0] != stretch[-1].key):
            yield _Found(cut[0], {}, False)
        start = _next_header(fd, end + BLOCK) if damaged else None


def _next_header(fd: int, start: int) -> int | None:
    """Where a ustar header with a right checksum begins, from `start` (a whole block) on; None: nowhere."""
    with mmap(fd, 0, access=ACCESS_READ) as data:
        at = data.find(b"ustar", start + _MAGIC)
        while at >= 0:
            if at % BLOCK == _MAGIC and _name_at(fd, at - _MAGIC) is not None:
                return at - _MAGIC
            at = data.find(b"ustar", at + 1)
    return None


def _name_at(fd: int, position: int) -> str | None:
    """The name in the header at `position`; None if none is there."""
    try:
        return tarfile.TarInfo.frombuf(os.pread(fd, BLOCK, position), "utf-8", "surrogateescape").name
    except (tarfile.TarError, ValueError):
        return None


def _keep(path: Path) -> Path:
    """A second name for the original, so that replacing it deletes nothing."""
    for number in count(1):
        original = path.with_name(path.name + ASIDE + (f".{number}" if number > 1 else ""))
        if not original.exists():
            break
        if original.samefile(path):  # killed at this place before
            return original
    try:
        os.link(path, original)
    except OSError:  # a file system without hard links
        os.rename(path, original)
    return original
