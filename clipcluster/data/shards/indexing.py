"""Indexes made from the tars themselves: a header scan, the small members, one hash pass for each shard.

What is known already is taken over: a shard of the same size and mtime is not hashed again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path

import numpy as np

from clipcluster.data.shards import captions
from clipcluster.data.shards.columns import BrokenColumns, write_columns
from clipcluster.data.shards.find import find_shards
from clipcluster.data.shards.folder_index import write_folder_index
from clipcluster.data.shards.shard_index import (
    FORMAT,
    column_types,
    read_shard_index,
    scan_shard,
    shard_index_path,
)
from clipcluster.data.shards.shard_list import IndexSummary, ShardEntry, read_list, summarize
from clipcluster.errors import UserError
from clipcluster.runs.files import file_sha256


def index_folder(
    folder: Path,
    index: Path | None = None,
    captions_choice: str | Sequence[str] | None = None,
    *,
    again: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> IndexSummary:
    """Indexes every tar of a folder; into `index` if the folder cannot be written to.

    The choices of captions asked for stand beside those that the index has already; with none asked for it
    keeps what it has, and a new one takes the folder's own. A shard of the same size and mtime is not hashed
    again, and keeps its rows if they have every choice, unless `again`. `progress(done, total)` is called
    after every shard. UserError: no folder, no shards, unknown choice, a place that cannot be written.
    """
    asked = [captions_choice] if isinstance(captions_choice, str) else list(captions_choice or ())
    shards, target = find_shards(folder), index or folder
    have, known = read_list(target)
    choices = tuple(dict.fromkeys([*have, *map(captions.check_choice, asked)]))
    choices = choices or (captions.choice_for(folder, None),)
    try:
        target.mkdir(parents=True, exist_ok=True)
        entries = _index_all(shards, target, choices, {} if again else known, workers, progress)
        write_folder_index(target, choices, entries)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--index {target}: a file has this name; give a folder") from None
    except PermissionError as error:
        if Path(str(error.filename)) in shards:
            raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None
        raise UserError(
            f"{target} cannot be written to ({error.strerror}: {error.filename}); put the index elsewhere: "
            f"clipcluster shards index {folder} --index FOLDER"
        ) from None
    return summarize(folder, target, choices, entries)


def _index_all(
    shards: Sequence[Path],
    target: Path,
    choices: tuple[str, ...],
    known: dict[str, ShardEntry],
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> list[ShardEntry]:
    done: dict[str, ShardEntry] = {}
    todo: dict[Path, str | None] = {}  # and the hashes that are known
    for path in shards:
        entry, state = known.get(path.name), path.stat()
        if entry is None or (state.st_size, state.st_mtime_ns) != (entry.bytes, entry.mtime_ns):
            todo[path] = None
        elif _has_rows(target, entry, choices):
            done[path.name] = entry
        else:
            todo[path] = entry.sha256
    with ExitStack() as stack:
        run: Callable[..., Iterable[ShardEntry]] = map
        if workers > 1 and len(todo) > 1:
            from concurrent.futures import ProcessPoolExecutor  # here: 3 MB that no loader worker needs
            from multiprocessing import get_context

            pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=get_context("spawn"))
            run = stack.enter_context(pool).map
        for entry in run(index_shard, todo, repeat(target), repeat(choices), todo.values()):
            done[entry.name] = entry
            if progress is not None:
                progress(len(done), len(shards))
    return [done[path.name] for path in shards]


def _has_rows(target: Path, entry: ShardEntry, choices: tuple[str, ...]) -> bool:
    """Whether the shard index on disk is that of the entry, and has every choice."""
    try:
        meta, arrays = read_shard_index(shard_index_path(target, entry.name))
    except (OSError, BrokenColumns):
        return False
    same = meta["sha256"] == entry.sha256 and len(arrays["offset"]) == entry.samples
    return same and set(choices) == set(meta["choices"]) == set(entry.captions)


def index_shard(path: Path, index: Path, choices: tuple[str, ...], digest: str | None = None) -> ShardEntry:
    """Scans and hashes one tar and writes its index; returns its entry.

    With `digest`, its known sha256, it is not hashed. UserError: it changed meanwhile, or is compressed.
    """
    before = path.stat()
    scanned = scan_shard(path, choices)
    digest = digest or file_sha256(path)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(
            f"{path} changed while it was being indexed; wait until it is written, then index again"
        )
    return write_entry(path, index, choices, digest, *scanned)


def write_entry(
    path: Path,
    index: Path,
    choices: tuple[str, ...],
    digest: str,
    columns: Mapping[str, np.ndarray],
    without_image: int = 0,
    duplicates: int = 0,
    broken: str | None = None,
) -> ShardEntry:
    """Writes the index of the shard at `path`, whose sha256 is `digest`; returns its entry for the folder's.

    columns: those of `shard_index`, each (samples,). ValueError where one is missing or has another length.
    """
    types = column_types(choices)
    if set(columns) != set(types) or len({len(values) for values in columns.values()}) > 1:
        raise ValueError(f"the columns of a shard are {', '.join(types)}, all of one length")
    ready = {name: np.asarray(columns[name], dtype) for name, dtype in types.items()}
    for name, values in ready.items():
        if name.startswith("captions/") and values.max(initial=0) < 256:
            ready[name] = values.astype(np.uint8)
    meta = {"format": FORMAT, "shard": path.name, "sha256": digest, "choices": list(choices)}
    write_columns(shard_index_path(index, path.name), meta, ready)
    state = path.stat()
    counts = {choice: ready[f"captions/{choice}"] for choice in choices}
    return ShardEntry(
        name=path.name,
        samples=len(ready["offset"]),
        captions={choice: int(of.sum(dtype=np.int64)) for choice, of in counts.items()},
        bytes=state.st_size,
        sha256=digest,
        mtime_ns=state.st_mtime_ns,
        without_caption={choice: int((of == 0).sum()) for choice, of in counts.items() if not of.all()},
        without_image=without_image,
        duplicates=duplicates,
        broken=broken,
    )
