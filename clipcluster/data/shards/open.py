"""What a recipe writes of its sources, opened: folders, tars, globs and braces, here or remote. No torch."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from clipcluster.data.shards import captions, folder_index, texts
from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.metadata import IndexedFolder
from clipcluster.data.storage.urls import (
    Forbidden,
    Named,
    RemoteFolder,
    braces,
    folder_at,
    is_remote,
    named,
    redacted,
)
from clipcluster.errors import UserError
from clipcluster.recipe.captions import probabilities_of

if TYPE_CHECKING:
    from clipcluster.data.storage.cache import Cache


class SourceSection(Protocol):
    """What a recipe says of one source; paths are absolute."""

    @property
    def shards(self) -> Any: ...
    @property
    def index(self) -> str | None: ...
    @property
    def captions_in(self) -> str | Mapping[str, float] | None: ...


def open_folder(
    path: str | Path,
    index: str | Path | None = None,
    captions_in: str | Mapping[str, float] | None = None,
    *,
    cache: Cache | None = None,
) -> Dataset:
    """Opens one folder of shards, which may be remote, with its captions. UserError as `open_source`."""
    shares = probabilities_of(captions_in)
    if is_remote(path):
        cache = cache or _default_cache()
        parts = list(_remote_parts(str(path), None if index is None else str(index), shares, cache))
        return Dataset(parts, tuple(shares.values()), cache)
    folder = Path(path)
    return Dataset(
        [IndexedFolder(folder, Path(index or folder), _choices(folder, shares))], tuple(shares.values())
    )


def open_source(source: SourceSection, *, text: bool, cache: Cache | None = None) -> Dataset:
    """Opens a source of a recipe: folders, tars, globs and braces, here or remote, or a list of them.

    `text` says whether captions are needed; `cache` is where remote shards are kept. UserError: no folder, no
    shards, no index, an index for other captions (each with the command that helps), no caption anywhere, or
    a shard larger than the cache. OSError where a remote index cannot be fetched.
    """
    written = [source.shards] if isinstance(source.shards, str) else list(source.shards)
    shown = ", ".join(map(redacted, written))
    shares = probabilities_of(source.captions_in) if text else None
    if cache is None and any(map(is_remote, written)):
        cache = _default_cache()
    parts = [part for entry in written for part in _parts(entry, source.index, shares, cache)]
    shards = Dataset(parts, tuple(shares.values()) if shares else (None,), cache)
    if shards.n_samples == 0:
        raise UserError(f"{shown}: the shards hold no sample with an image")
    if text:
        _require_captions(shown, shards)
    if cache is not None:
        shards.check_cache_size(cache.size)
    return shards


def _default_cache() -> Cache:
    """The user's own; loaded here, because local shards need none of it."""
    from clipcluster.data.storage.cache import Cache, default_folder

    return Cache(default_folder())


def _require_captions(written: str, shards: Dataset) -> None:
    """Every choice finds a caption somewhere: one that finds none was mistyped, or the data lack it."""
    for number, choice in enumerate(field.choice for field in shards.fields):
        if not shards.more_than_of(number)[0].any():
            raise UserError(
                f"{written}: no sample has a caption by the choice {choice!r}; if they are in a field of the "
                "JSON, say captions_in: json:FIELD and run: clipcluster shards index "
                f"{shards.parts[0].folder} --captions json:FIELD"
            )


def _choices(folder: Path, shares: Mapping[str | None, float | None] | None) -> tuple[str, ...] | None:
    """The choices in force for a folder."""
    return None if shares is None else tuple(captions.choice_for(folder, choice) for choice in shares)


def _parts(
    entry: str, index: str | None, shares: Mapping[str | None, float | None] | None, cache: Cache | None
) -> Iterator[IndexedFolder]:
    """The folders that one written entry names, with the shards it takes of each."""
    if is_remote(entry):
        assert cache is not None
        yield from _remote_parts(entry, index, shares, cache)
        return
    if index is not None and is_remote(index):
        raise UserError(
            f"index {redacted(index)!r}: the shards {entry!r} are on this machine; their index has to be too"
        )
    if entry.endswith(".tar"):
        paths = [Path(name) for pattern in braces(entry) for name in sorted(glob.glob(pattern)) or [pattern]]
    else:
        folders = [name for pattern in braces(entry) for name in sorted(glob.glob(pattern)) or [pattern]]
        for folder in map(Path, folders):
            yield IndexedFolder(folder, Path(index or folder), _choices(folder, shares))
        return
    for folder in dict.fromkeys(path.parent for path in paths):
        part = IndexedFolder(folder, Path(index or folder), _choices(folder, shares))
        names = {name: row for row, name in enumerate(Dataset([part]).shard_names)}
        wanted = [path.name for path in paths if path.parent == folder]
        missing = [name for name in wanted if name not in names]
        if missing and glob.has_magic(missing[0]):
            raise UserError(
                f"{folder / missing[0]}: no shard of {folder} has such a name; the first one is "
                f"{min(names, default='none')}"
            )
        if missing:
            raise UserError(
                f"{folder / missing[0]}: not in the index of its folder ({len(missing)} of {len(wanted)} "
                f"shards are not); make it with: clipcluster shards index {folder}"
            )
        rows = tuple(sorted({names[name] for name in wanted}))
        yield replace(part, rows=rows if len(rows) < len(names) else None)


def _remote_parts(
    entry: str, index: str | None, shares: Mapping[str | None, float | None] | None, cache: Cache
) -> Iterator[IndexedFolder]:
    """The same of an entry that lies elsewhere: its index is local, or fetched."""
    for taken in named(entry):
        place, rows_at = _index_of(taken, entry, index, cache)
        part = IndexedFolder(taken.folder, place, _choices(place, shares), None, rows_at)
        if taken.tars is None:
            yield part
            continue
        names = {name: row for row, name in enumerate(Dataset([part]).shard_names)}
        rows = tuple(sorted(names[name] for name in taken.chosen(list(names))))
        yield part if len(rows) == len(names) else replace(part, rows=rows)


def _index_of(taken: Named, entry: str, index: str | None, cache: Cache) -> tuple[Path, RemoteFolder | None]:
    """Where the index of remote shards lies here, and where the rows of each shard are fetched from."""
    command = f"clipcluster shards index {redacted(entry)!r} --index FOLDER"
    if index is not None and not is_remote(index):
        if not (Path(index) / folder_index.COLUMNS_FILE).is_file():
            raise UserError(f"{taken.folder}: there is no index in {index}; make it with: {command}")
        return Path(index), None
    at = folder_at(index) if index is not None else taken.folder
    if at.is_pipe:
        raise UserError(
            f"{redacted(entry)!r}: a command cannot list its shards; make an index with: {command} and say "
            "index: FOLDER"
        )
    try:
        place, why = cache.index(at, folder_index.COLUMNS_FILE, texts.DATASET_TYPE), ""
    except Forbidden as error:
        place, why = None, f": {error.strerror}"
    if place is None:
        raise UserError(
            f"{at}: these shards have no index ({folder_index.COLUMNS_FILE}) there{why}; put one beside "
            f"them, or make one here with: {command} and say index: FOLDER"
            + (" (an http server cannot list: name the tars by braces)" if taken.tars is None else "")
        )
    return place, at
