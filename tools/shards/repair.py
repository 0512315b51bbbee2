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

from clipcluster.data.shards import indexing, shard_index, shard_list
from clipcluster.data.shards.find import find_shards
from clipcluster.data.shards.tar import BrokenTar, scan
from clipcluster.errors import UserError
from clipcluster.runs.files import file_sha256
from tools.shards.salvage import salvage
from tools.shards.verify import CHANGED, CUT, GONE, ROWS, verify

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
    find_shards(folder)
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
    try:
        report = verify(folder, index, images=False, workers=workers, progress=progress)
    except UserError as error:  # no index, or a damaged one
        yield from filter(None, map(_salvaged, find_shards(folder)))
        yield _listed(folder, index, workers, f"the index was made ({str(error).partition(';')[0]})")
        return
    faults = {entry["shard"]: entry["fault"] for entry in report.broken}
    choices, listed = shard_list.read_list(index)
    todo = [_shard(folder / name, fault, index, choices, listed.get(name)) for name, fault in faults.items()]
    yield from filter(None, todo)
    if not any(deed is not None and deed.done and deed.file.endswith(".tar") for deed in todo):
        return
    gone = [name for name, fault in faults.items() if fault == GONE]
    if gone:
        what = f"the list was left as it is while {gone[0]} is gone: it says what is missing"
        yield Deed(shard_list.ENTRIES_FILE, False, what)
    else:
        words = "the list was rewritten: a run that used the old one will not resume"
        yield _listed(folder, index, workers, words)


def _listed(folder: Path, index: Path, workers: int, words: str) -> Deed:
    """Writes the list anew; what keeps it from that, such as a compressed shard, does not undo the rest."""
    try:
        indexing.index_folder(folder, index, workers=workers)
    except UserError as error:
        return Deed(shard_list.ENTRIES_FILE, False, f"the list was left as it is: {error}; then repair again")
    return Deed(shard_list.ENTRIES_FILE, True, words)


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


def _shard(
    path: Path, fault: str, index: Path, choices: tuple[str, ...], listed: shard_list.ShardEntry | None
) -> Deed | None:
    """Deals with a broken shard; a deed that is done for a tar asks for a new list. None: nothing to do."""
    if fault == GONE:
        advice = f"restore it, or continue without it: clipcluster shards index {path.parent}"
        return Deed(path.name, False, f"gone: {advice}")
    if fault == ROWS and (listed is None or file_sha256(path) == listed.sha256):
        indexing.index_shard(path, index, choices)
        rows = shard_index.shard_index_path(index, path.name)
        return Deed(rows.name, True, "its shard index was rebuilt from the tar")
    state = path.stat()  # what was rewritten by somebody has another time
    if (
        fault in (CHANGED, ROWS)
        and listed is not None
        and (state.st_size, state.st_mtime_ns) == (listed.bytes, listed.mtime_ns)
    ):
        return Deed(
            path.name,
            False,
            "its bytes changed while size and time did not, as on a failing disk: restore it from its "
            f"source, or accept it as it is: clipcluster shards index --again {path.parent}",
        )
    new = None if fault == CUT else Deed(path.name, True, "new or rewritten: indexed")
    return _salvaged(path) or new


def _salvaged(path: Path) -> Deed | None:
    """Makes a damaged tar sound; None if it is."""
    with open(path, "rb") as file:
        try:
            for _ in scan(file.fileno()):
                pass
            return None
        except BrokenTar as error:
            reason = str(error)
    salvaged = salvage(path)
    if salvaged is None:
        return Deed(path.name, False, f"{reason}; it holds no complete sample")
    text = f"{reason}; its {salvaged.kept} complete samples are in a valid tar now, the original is kept as "
    text += salvaged.original.name
    if salvaged.left_out:
        text += f"; incomplete and left out: {', '.join(salvaged.left_out[:10])}"
    return Deed(path.name, True, text)
