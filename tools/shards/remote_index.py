"""The index of shards that lie elsewhere: each is streamed once, through the cache, hashed and scanned."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from clipcluster.data.shards import captions as choices_of
from clipcluster.data.shards import folder_index, indexing, shard_index, shard_list
from clipcluster.data.shards.captions import BESIDE_SHARDS
from clipcluster.data.storage.cache import Cache, default_folder
from clipcluster.data.storage.download import read_beside, state_of
from clipcluster.data.storage.urls import (
    OtherContent,
    Refused,
    RemoteFolder,
    State,
    Unreachable,
    chosen,
    named,
    redacted,
    tars_of,
)
from clipcluster.errors import UserError

_DONE = ".indexing.jsonl"  # the shards that are done, until the list is written


def index_remote(
    written: str,
    target: Path,
    captions: str | Sequence[str] | None = None,
    *,
    again: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> shard_list.IndexSummary:
    """Indexes the shards that an address or a command names, into the local folder `target`.

    A shard whose size and ETag (or time) are those of the index that is there keeps its rows unless `again`;
    where the server tells neither, it is fetched. One that was killed goes on with what it had not done. The
    small texts beside the shards are copied. UserError: shards of several folders, none, one that is gone or
    cannot be fetched, a folder that cannot be listed, a place that cannot be written to.
    """
    asked = [captions] if isinstance(captions, str) else list(captions or ())
    try:
        folder, names = _shards(written)
        target.mkdir(parents=True, exist_ok=True)
        for beside in BESIDE_SHARDS:  # what captions and classes are, of the folder or of the one above
            text = read_beside(folder, beside)
            if text is not None:
                (target / beside).write_bytes(text)
        known = shard_list.read_list(target)[1] | _done_before(target)
        have = next((entry.captions for entry in known.values()), {})
        choices = tuple(dict.fromkeys([*have, *map(choices_of.check_choice, asked)]))
        choices = choices or (choices_of.choice_for(target, None),)
        index = partial(
            _index_shard, Cache(default_folder()), folder, target, choices, {} if again else known
        )
        entries = []
        with ThreadPoolExecutor(workers) as pool:
            for count, entry in enumerate(pool.map(index, names), 1):
                entries.append(entry)
                if progress is not None:
                    progress(count, len(names))
        folder_index.write_folder_index(target, choices, entries)
        (target / _DONE).unlink(missing_ok=True)
    except PermissionError as error:
        raise UserError(f"{target}: {error}; choose a writable folder with --index") from None
    except (Unreachable, Refused) as error:
        raise UserError(
            f"{error.filename}: {error.strerror}; the same command continues with the remaining shards"
        ) from None
    return shard_list.summarize(str(folder), target, choices, entries)


def _done_before(target: Path) -> dict[str, shard_list.ShardEntry]:
    """The shards that a killed call had indexed; its last line may be torn."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (target / _DONE).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                entry = shard_list.entry_of(json.loads(line))
                found[entry.name] = entry
    return found


def _shards(written: str) -> tuple[RemoteFolder, list[str]]:
    """The folder and the names of the tars that an entry names, sorted."""
    groups = named(written)
    if len(groups) != 1:
        raise UserError(
            f"{redacted(written)}: shards of {len(groups)} folders; an index covers one folder, so "
            "index each separately"
        )
    folder, tars = groups[0]
    if tars is not None and not any(set("*?[") & set(name) for name in tars):
        return folder, sorted(set(tars))
    names = tars_of(folder)
    return folder, sorted(names if tars is None else chosen(folder, tars, names))


def _index_shard(
    cache: Cache,
    folder: RemoteFolder,
    target: Path,
    choices: tuple[str, ...],
    known: Mapping[str, shard_list.ShardEntry],
    name: str,
) -> shard_list.ShardEntry:
    """Indexes one shard, unless its rows are there already."""
    address, entry = (folder / name).address, known.get(name)
    try:
        if entry is not None and not _is_unchanged(entry, target, address):
            entry = None
        if entry is not None and set(entry.captions) == set(choices):
            return entry
        fd, digest, stamp = _fetched(cache, address, entry)
    except FileNotFoundError:
        raise UserError(f"{folder / name}: no such shard") from None
    with open(fd, "rb"), tempfile.TemporaryDirectory() as place:
        path = Path(place) / name
        path.symlink_to(f"/dev/fd/{fd}")
        made = replace(indexing.index_shard(path, target, choices, digest), mtime_ns=stamp)
    with open(target / _DONE, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(made)) + "\n")  # one write: the lines of several threads stay whole
    return made


def _is_unchanged(entry: shard_list.ShardEntry, target: Path, address: str) -> bool:
    if not shard_index.shard_index_path(target, entry.name).is_file():
        return False
    state = state_of(address)
    return state.stamp != 0 and state == State(entry.bytes, entry.mtime_ns)


def _fetched(cache: Cache, address: str, entry: shard_list.ShardEntry | None) -> tuple[int, str, int]:
    """A handle on the bytes, their sha256, and the server's stamp."""
    if entry is not None:
        with contextlib.suppress(OtherContent):
            return cache.shard(address, entry.bytes, entry.sha256), entry.sha256, entry.mtime_ns
    fd, got = cache.unnamed(address)
    return fd, got.sha256, got.stamp
