"""A damaged tar made sound: its whole samples in a new one, the original kept beside it."""

import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from clipcluster.data.shards.shard_index import sample_name
from clipcluster.data.shards.tar import BLOCK, END, BrokenTar, Member, padded, scan

ASIDE = ".broken"  # what the original's name gets
_CHUNK = 4 << 20
_MAGIC = 257  # where `ustar` stands in a header


class Run(NamedTuple):
    """Members of one sample, by extension, in the order of the tar; `key` None: members of no sample."""

    key: str | None
    members: tuple[tuple[str, Member], ...]

    @property
    def extensions(self) -> frozenset[str]:
        return frozenset(extension for extension, _ in self.members)


@dataclass
class Salvaged:
    """What became of a damaged tar: how many samples are in the sound one, and which were left out."""

    original: Path
    kept: int = 0
    left_out: list[str] = field(default_factory=list)


def runs(members: Iterable[Member]) -> Iterator[Run]:
    """Puts members together to samples as the index does: one key, no extension twice."""
    key: str | None = None
    held: dict[str, Member] = {}
    for member in members:
        name = sample_name(member.name)
        if held and (name is None or name[0] != key or name[1] in held):
            yield Run(key, tuple(held.items()))
            held = {}
        if name is None:
            yield Run(None, (("", member),))
        else:
            key, held[name[1]] = name[0], member
    if held:
        yield Run(key, tuple(held.items()))


def salvage(path: Path) -> Salvaged | None:
    """Replaces a damaged tar by a sound one of its whole samples; None, and nothing done, if none is whole.

    The original stays beside it as NAME.broken (.broken.2, … if there is one already). A sample next to the
    damage is whole if it has the members that others of the shard have.
    """
    fd = os.open(path, os.O_RDONLY)
    aside = path.with_name(f".{path.name}.part")
    try:
        stretches = list(_stretches(fd))
        whole, left_out = _whole(stretches)
        if not any(run.key is not None for run in whole):
            return None
        with open(aside, "wb") as file:
            for run in whole:
                for _, member in run.members:
                    _copy(fd, member.start, member.offset + padded(member.size), file)
            file.write(END)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    original = _keep(path)
    os.replace(aside, path)
    return Salvaged(original, sum(run.key is not None for run in whole), left_out)


class _Stretch(NamedTuple):
    """Readable members between two damaged places; `cut` is the name of the member at the end, if known."""

    runs: list[Run]
    after_damage: bool
    damaged: bool  # at its end
    cut: str | None


def _stretches(fd: int) -> Iterator[_Stretch]:
    size = os.fstat(fd).st_size
    start: int | None = 0
    after_damage = False
    while start is not None:
        members: list[Member] = []
        damaged, at = False, start
        try:
            for member in scan(fd, start, size):
                members.append(member)
                at = member.offset + padded(member.size)
        except BrokenTar:
            damaged = True
        cut = _name_at(fd, at) if damaged else None
        yield _Stretch(list(runs(members)), after_damage, damaged, cut)
        start = _next_header(fd, at + BLOCK, size) if damaged else None
        after_damage = True


def _next_header(fd: int, start: int, size: int) -> int | None:
    """Where a ustar header with a right checksum begins, from `start` (a whole block) on; None: nowhere."""
    for begin in range(start, size - BLOCK + 1, _CHUNK):
        blocks = os.pread(fd, _CHUNK, begin)
        at = blocks.find(b"ustar", _MAGIC)
        while at >= 0:
            if at % BLOCK == _MAGIC and _name_at(fd, begin + at - _MAGIC) is not None:
                return begin + at - _MAGIC
            at = blocks.find(b"ustar", at + 1)
    return None


def _name_at(fd: int, position: int) -> str | None:
    """The name in the header at `position`; None if none is there."""
    try:
        return tarfile.TarInfo.frombuf(os.pread(fd, BLOCK, position), "utf-8", "surrogateescape").name
    except (tarfile.TarError, ValueError):
        return None


def _whole(stretches: Iterable[_Stretch]) -> tuple[list[Run], list[str]]:
    """The runs to keep, and the keys of those left out."""
    settled: list[tuple[Run, bool | None]] = []  # None: next to the damage, decided by comparison
    for stretch in stretches:
        for number, run in enumerate(stretch.runs):
            verdict: bool | None = True
            if stretch.after_damage and number == 0:
                verdict = None
            if stretch.damaged and number == len(stretch.runs) - 1:
                name = None if stretch.cut is None else sample_name(stretch.cut)
                verdict = False if name is not None and name[0] == run.key else None
            settled.append((run, True if run.key is None else verdict))
        if stretch.cut is not None and sample_name(stretch.cut) is not None:
            key, extension = sample_name(stretch.cut)  # type: ignore[misc]
            if not stretch.runs or stretch.runs[-1].key != key:
                settled.append((Run(key, ((extension, Member(stretch.cut, 0, 0, 0)),)), False))
    usual = {run.extensions for run, verdict in settled if verdict and run.key is not None}
    kept, left_out = [], []
    for run, verdict in settled:
        if verdict or (verdict is None and run.extensions in usual):
            kept.append(run)
        elif run.key is not None:
            left_out.append(run.key)
    return kept, left_out


def _copy(source: int, begin: int, end: int, file: BinaryIO) -> None:
    while begin < end:
        data = os.pread(source, min(_CHUNK, end - begin), begin)
        if not data:  # the padding of the last member was cut off
            file.write(bytes(end - begin))
            return
        file.write(data)
        begin += len(data)


def _keep(path: Path) -> Path:
    """A second name for the original, so that replacing it deletes nothing."""
    for number in range(1, 1000):
        original = path.with_name(path.name + ASIDE + (f".{number}" if number > 1 else ""))
        if original.exists():
            if original.samefile(path):  # killed at this place before
                return original
            continue
        try:
            os.link(path, original)
        except OSError:  # a file system without hard links
            os.rename(path, original)
        return original
    raise FileExistsError(f"{path}{ASIDE}: too many copies exist; remove some")
