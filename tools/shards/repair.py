"""`clipcluster shards verify --repair`: repairs what can be repaired without losing data.

It deletes no data and blesses no damage: what was left half-written is removed, the rows of the index are
made again from their tars, shards that are new or were written anew are indexed, and of a damaged tar the
whole samples are put into a sound one, the original kept beside it. A shard that is gone, or whose bytes
changed while its size and time did not, is for its owner to bring back.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from clipcluster.data.shards import captions, indexing, shard_index, shard_list
from clipcluster.data.shards.tar import BrokenTar, scan
from clipcluster.errors import UserError
from clipcluster.runs.files import file_sha256
from tools.shards.salvage import salvage
from tools.shards.verify import CHANGED, CUT, GONE, ROWS, UNKNOWN, Report, verify

_ABANDONED = 600.0  # seconds without a write after which a half-written file is nobody's


class Deed(NamedTuple):
    """What was done about one file, or (`done` false) why it was left alone."""

    file: str
    done: bool
    what: str


def repair_folder(
    folder: Path,
    index: Path | None = None,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Deed]:
    """Repairs a folder of shards and its index, as the module says; returns what it did, in order.

    UserError: no folder, no shards, or a place that cannot be written.
    """
    indexing.find_shards(folder)
    try:
        return list(_repair(folder, index or folder, workers, progress))
    except PermissionError as error:
        raise UserError(
            f"{folder} cannot be repaired ({error.strerror}: {error.filename}); change permissions, "
            "or copy the shards to a folder you can write to"
        ) from None


def _repair(
    folder: Path, index: Path, workers: int, progress: Callable[[int, int], None] | None
) -> Iterator[Deed]:
    for place in dict.fromkeys((folder, index)):
        yield from _parts_left(place)
    choices = _choices(folder, index)
    try:
        report = verify(folder, index, images=False, workers=workers, progress=progress)
    except UserError as error:  # no index, or a damaged one
        for path in indexing.find_shards(folder):
            yield from _salvaged(path)
        words = f"the index was made ({str(error).partition(';')[0]})"
        yield _listed(folder, index, choices, workers, words)
        return
    todo = list(_shards(folder, index, choices, report))
    yield from todo
    if not any(deed.done and deed.file.endswith(".tar") for deed in todo):
        return
    gone = [entry["shard"] for entry in report.broken if entry["fault"] == GONE]
    if gone:
        yield Deed(
            shard_list.ENTRIES_FILE,
            False,
            f"the list was left as it is while {gone[0]} is gone: it says what is missing",
        )
        return
    words = "the list was rewritten: a run that used the old one will not resume"
    yield _listed(folder, index, choices, workers, words)


def _listed(folder: Path, index: Path, choices: list[str], workers: int, words: str) -> Deed:
    """Writes the list anew; what keeps it from that, such as a compressed shard, does not undo the rest."""
    try:
        indexing.index_folder(folder, index, choices, workers=workers)
    except UserError as error:
        return Deed(shard_list.ENTRIES_FILE, False, f"the list was left as it is: {error}; then repair again")
    return Deed(shard_list.ENTRIES_FILE, True, words)


def _choices(folder: Path, index: Path) -> list[str]:
    """The choices of captions that the index has, or is to have."""
    try:
        return list(shard_list.read_summary(folder, index).choices)
    except UserError:
        return [captions.choice_for(folder, None)]


def _parts_left(place: Path) -> Iterator[Deed]:
    """Removes what a killed writer left behind; what was written to lately may still be somebody's."""
    for path in sorted(place.glob(".*.part")) if place.is_dir() else ():
        if not path.is_file():
            continue
        if time.time() - path.stat().st_mtime < _ABANDONED:
            yield Deed(
                path.name, False, "half-written, but touched in the last ten minutes: left to its writer"
            )
            continue
        path.unlink()
        yield Deed(path.name, True, "half-written and abandoned: removed")


def _shards(folder: Path, index: Path, choices: list[str], report: Report) -> Iterator[Deed]:
    """Deals with each broken shard; a deed that is done for a tar asks for a new list."""
    entries = shard_list.read_list(index)[1] if report.broken else {}
    for entry in report.broken:
        path, fault = folder / entry["shard"], entry["fault"]
        if fault == GONE:
            yield Deed(
                path.name,
                False,
                f"gone: restore it, or continue without it: clipcluster shards index {folder}",
            )
        elif fault == ROWS:
            yield from _rows(path, index, choices, entries.get(path.name))
        elif fault == CHANGED and _looks_unchanged(path, entries.get(path.name)):
            yield _rotten(path)
        elif fault in (CHANGED, UNKNOWN, CUT):
            salvaged = list(_salvaged(path))
            yield from salvaged
            if not salvaged and fault != CUT:
                yield Deed(path.name, True, "new or rewritten: indexed")


def _rows(
    path: Path, index: Path, choices: list[str], listed: shard_list.ShardEntry | None
) -> Iterator[Deed]:
    if listed is not None and file_sha256(path) != listed.sha256:
        if _looks_unchanged(path, listed):
            yield _rotten(path)
        else:
            yield Deed(path.name, True, "rewritten: indexed")
        return
    indexing.index_shard(path, index, tuple(choices))
    yield Deed(
        shard_index.shard_index_path(index, path.name).name, True, "its shard index was rebuilt from the tar"
    )


def _rotten(path: Path) -> Deed:
    return Deed(
        path.name,
        False,
        "its bytes changed while size and time did not, as on a failing disk: restore it from its source, "
        f"or accept it as it is: clipcluster shards index --again {path.parent}",
    )


def _looks_unchanged(path: Path, listed: shard_list.ShardEntry | None) -> bool:
    """By size and time: what was rewritten by somebody has another time."""
    state = path.stat()
    return listed is not None and (state.st_size, state.st_mtime_ns) == (listed.bytes, listed.mtime_ns)


def _salvaged(path: Path) -> Iterator[Deed]:
    """Makes a damaged tar sound; nothing if it is."""
    with open(path, "rb") as file:
        try:
            for _ in scan(file.fileno()):
                pass
            return
        except BrokenTar as error:
            reason = str(error)
    salvaged = salvage(path)
    if salvaged is None:
        yield Deed(path.name, False, f"{reason}; it holds no complete sample")
        return
    text = f"{reason}; its {salvaged.kept} complete samples are in a valid tar now, the original is kept as "
    text += salvaged.original.name
    if salvaged.left_out:
        text += f"; incomplete and left out: {', '.join(salvaged.left_out[:10])}"
    yield Deed(path.name, True, text)
