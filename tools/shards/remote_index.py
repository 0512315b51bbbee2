"""The index of shards that lie elsewhere: each is streamed once, through the cache, hashed and scanned."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from clipcluster.data.shards import captions as choices_of
from clipcluster.data.shards import folder_index, indexing, shard_index, shard_list
from clipcluster.data.shards.texts import BESIDE_SHARDS
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
    try:
        return _index(written, target, captions, again, workers, progress)
    except (Unreachable, Refused) as error:
        raise UserError(
            f"{error.filename}: {error.strerror}; the same command continues with the remaining shards"
        ) from None


def _index(
    written: str,
    target: Path,
    captions: str | Sequence[str] | None,
    again: bool,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> shard_list.IndexSummary:
    folder, names = _shards(written)
    asked = [captions] if isinstance(captions, str) else list(captions or ())
    try:
        target.mkdir(parents=True, exist_ok=True)
        _copy_words(folder, target)
        known = shard_list.read_list(target)[1] | _done_before(target)
        have = next((entry.captions for entry in known.values()), {})
        choices = tuple(dict.fromkeys([*have, *map(choices_of.check_choice, asked)]))
        choices = choices or (choices_of.choice_for(target, None),)
        job = _Job(Cache(default_folder()), folder, target, choices, {} if again else known)
        entries = []
        with ThreadPoolExecutor(workers) as pool:
            for count, entry in enumerate(pool.map(job.entry, names), 1):
                entries.append(entry)
                if progress is not None:
                    progress(count, len(names))
        folder_index.write_folder_index(target, choices, entries)
        (target / _DONE).unlink(missing_ok=True)
    except PermissionError as error:
        raise UserError(f"{target}: {error}; choose a writable folder with --index") from None
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


def _copy_words(folder: RemoteFolder, target: Path) -> None:
    """Brings the texts that say what captions and classes are, of the folder or of the one above."""
    for name in BESIDE_SHARDS:
        data = read_beside(folder, name)
        if data is not None:
            (target / name).write_bytes(data)


@dataclass(frozen=True)
class _Job:
    cache: Cache
    folder: RemoteFolder
    target: Path
    choices: tuple[str, ...]
    known: dict[str, shard_list.ShardEntry]

    def entry(self, name: str) -> shard_list.ShardEntry:
        """Indexes one shard, unless its rows are there already."""
        try:
            entry = self._unchanged(name)
            if entry is not None and set(entry.captions) == set(self.choices):
                return entry
            fd, digest, stamp = self._fetched(name, entry)
        except FileNotFoundError:
            raise UserError(f"{self.folder / name}: no such shard") from None
        with _as_file(fd, name) as path:
            made = indexing.index_shard(path, self.target, self.choices, digest)
        made = replace(made, mtime_ns=stamp)
        with open(self.target / _DONE, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(made)) + "\n")  # one write: the lines of several threads stay whole
        return made

    def _unchanged(self, name: str) -> shard_list.ShardEntry | None:
        entry = self.known.get(name)
        if entry is None or not shard_index.shard_index_path(self.target, name).is_file():
            return None
        state = state_of((self.folder / name).address)
        same = state.stamp != 0 and state == State(entry.bytes, entry.mtime_ns)
        return entry if same else None

    def _fetched(self, name: str, entry: shard_list.ShardEntry | None) -> tuple[int, str, int]:
        """A handle on the bytes, their sha256, and the server's stamp."""
        address = (self.folder / name).address
        if entry is not None:
            with contextlib.suppress(OtherContent):
                return self.cache.shard(address, entry.bytes, entry.sha256), entry.sha256, entry.mtime_ns
        fd, got = self.cache.unnamed(address)
        return fd, got.sha256, got.stamp


@contextlib.contextmanager
def _as_file(fd: int, name: str) -> Iterator[Path]:
    """A path that ends in `name` and leads to an open file, which is closed at the end."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.symlink_to(f"/dev/fd/{fd}")
            yield path
    finally:
        os.close(fd)
