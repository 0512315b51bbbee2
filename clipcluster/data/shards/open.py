"""What a recipe writes of its sources, opened: folders, tars, globs and braces, here or remote. No torch."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clipcluster.data.shards import captions, folder_index
from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.folder_index import IndexedFolder
from clipcluster.data.storage.urls import (
    Forbidden,
    RemoteFolder,
    Selection,
    braces,
    chosen,
    folder_at,
    is_remote,
    named,
    redacted,
)
from clipcluster.errors import UserError
from clipcluster.recipe.captions import probabilities_of

if TYPE_CHECKING:
    from clipcluster.data.storage.cache import Cache
    from clipcluster.recipe.sections.data import Source


Asked = Mapping[str | None, float | None]  # choices of captions (None: the folder's own) and probabilities


def open_folder(
    path: str | Path,
    index: str | Path | None = None,
    captions_in: str | Mapping[str, float] | None = None,
    *,
    cache: Cache | None = None,
) -> Dataset:
    """Opens one folder of shards, which may be remote, with its captions. UserError as `open_source`."""
    return _opened([str(path)], None if index is None else str(index), probabilities_of(captions_in), cache)


def open_source(source: Source, *, text: bool, cache: Cache | None = None) -> Dataset:
    """Opens a source of a recipe: folders, tars, globs and braces, here or remote, or a list of them.

    `text` says whether captions are needed; `cache` is where remote shards are kept. UserError: no folder, no
    shards, no index, an index for other captions (each with the command that helps), no caption anywhere, or
    a shard larger than the cache. OSError where a remote index cannot be fetched.
    """
    written = [source.shards] if isinstance(source.shards, str) else list(source.shards)
    shown = ", ".join(map(redacted, written))
    asked = probabilities_of(source.captions_in) if text else None
    dataset = _opened(written, source.index, asked, cache)
    if dataset.n_samples == 0:
        raise UserError(f"{shown}: the shards hold no sample with an image")
    for number, field in enumerate(dataset.fields if text else ()):
        if not dataset.more_than_of(number)[0].any():  # mistyped, or the data lack it
            raise UserError(
                f"{shown}: no sample has a caption by the choice {field.choice!r}; if they are in a field of "
                "the JSON, set captions_in: json:FIELD and run: clipcluster shards index "
                f"{dataset.folders[0].folder} --captions json:FIELD"
            )
    if dataset.cache is not None:
        dataset.check_cache_size(dataset.cache.size)
    return dataset


def _opened(written: Sequence[str], index: str | None, asked: Asked | None, cache: Cache | None) -> Dataset:
    """The folders of all entries as one source; without a `cache` remote ones take the user's own."""
    if cache is None and any(map(is_remote, written)):
        from clipcluster.data.storage.cache import Cache, default_folder  # local shards need none of it

        cache = Cache(default_folder())
    folders = [folder for entry in written for folder in _folders_of(entry, index, asked, cache)]
    return Dataset(folders, () if asked is None else tuple(asked.values()), cache)


def _folders_of(
    entry: str, index: str | None, asked: Asked | None, cache: Cache | None
) -> Iterator[IndexedFolder]:
    """The folders that one entry of a recipe names, with the shards taken of each."""
    if is_remote(entry):
        assert cache is not None
        for selection in named(entry):
            local, remote = _index_of(selection, entry, index, cache)
            folder = IndexedFolder(selection.folder, local, _choices(local, asked), None, remote)
            yield _taking(folder, selection.tars)
        return
    if index is not None and is_remote(index):
        raise UserError(
            f"index {redacted(index)!r}: the shards {entry!r} are on this machine; their index must be too"
        )
    for path, tars in folders_here(entry).items():
        yield _taking(IndexedFolder(path, Path(index or path), _choices(path, asked)), tars)


def folders_here(entry: str) -> dict[Path, list[str] | None]:
    """The folders of this machine that an entry names, each with the tars named of it; None: all of them."""
    # a folder that is there is itself, whatever its name
    patterns = [glob.escape(entry)] if os.path.isdir(entry) else braces(entry)
    taken: dict[Path, list[str] | None] = {}
    for path in (Path(name) for pattern in patterns for name in sorted(glob.glob(pattern)) or [pattern]):
        if not entry.endswith(".tar"):
            taken[path] = None
        elif (tars := taken.setdefault(path.parent, [])) is not None:
            tars.append(path.name)
    return taken


def _choices(folder: Path, asked: Asked | None) -> tuple[str, ...] | None:
    """The choices in force for a folder; None where no captions are needed."""
    return None if asked is None else tuple(captions.choice_for(folder, choice) for choice in asked)


def _taking(folder: IndexedFolder, tars: Sequence[str] | None) -> IndexedFolder:
    """A folder with these shards, names and globs, alone. UserError where one is not in its index."""
    if tars is None:
        return folder
    numbers = {name: number for number, name in enumerate(Dataset([folder]).shard_names)}
    taken = tuple(sorted(numbers[name] for name in chosen(folder.folder, tars, list(numbers))))
    return folder if len(taken) == len(numbers) else replace(folder, taken=taken)


def _index_of(
    selection: Selection, entry: str, index: str | None, cache: Cache
) -> tuple[Path, RemoteFolder | None]:
    """The folder on this machine with the index of remote shards, and where each shard's index is fetched."""
    command = f"clipcluster shards index {redacted(entry)!r} --index FOLDER"
    if index is not None and not is_remote(index):
        if not (Path(index) / folder_index.COLUMNS_FILE).is_file():
            raise UserError(f"{selection.folder}: there is no index in {index}; make it with: {command}")
        return Path(index), None
    remote = folder_at(index) if index is not None else selection.folder
    if remote.is_pipe:
        raise UserError(
            f"{redacted(entry)!r}: a command cannot list its shards; make an index with: {command} and set "
            "index: FOLDER"
        )
    try:
        local, why = cache.index(remote, folder_index.COLUMNS_FILE, captions.DATASET_TYPE), ""
    except Forbidden as error:
        local, why = None, f": {error.strerror}"
    if local is None:
        raise UserError(
            f"{remote}: these shards have no index ({folder_index.COLUMNS_FILE}) there{why}; put one beside "
            f"them, or make one here with: {command} and set index: FOLDER"
            + (" (an http server cannot list: name the tars by braces)" if selection.tars is None else "")
        )
    return local, remote
