"""The index of a folder of shards: where every sample begins, its captions' number, what the bytes hash to.

Beside the tars, or in a folder of its own for shards that cannot be written to:

    SHARD.tar.idx   one row a sample: offsets and sizes of image and captions, caption counts, class
    index.json      for people: the list of shards with samples, captions, bytes, sha256, mtime_ns
    index.bin       the same list as mapped columns, and every sample's caption counts and class; written last

It is built from the tars themselves: a header scan, the small members, one hash pass. Captions are counted
for one choice or for several side by side (`clipcluster.recipe.captions`); another one is added without
hashing.

Columns of index.bin, S shards and N samples: `samples`, `sample_ends` (their running sum), `bytes`,
`mtime_ns`, `name_ends` (S,) int64; `sha256` (S, 32), `names` uint8; `classes` (N,) int32, left out where no
sample has one; and for each choice `captions/CHOICE` (N,) uint8 or int32 and `more_than/CHOICE` (C, S) int32,
row c the samples of each shard with more than c captions.
"""

import difflib
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.data.shards.columns import (
    BrokenColumns,
    Columns,
    Stream,
    read_columns,
    require,
    write_columns,
)
from clipcluster.data.shards.find import find_shards
from clipcluster.data.shards.shard_index import FORMAT, read_shard_index, shard_index_path
from clipcluster.data.shards.shard_list import ENTRIES_FILE, ShardEntry, plain
from clipcluster.data.storage.urls import RemoteFolder
from clipcluster.errors import UserError
from clipcluster.runs.files import write_text

COLUMNS_FILE = "index.bin"

_CHUNK = 1 << 13  # shards whose columns are compared at once
_SCAN = 1 << 20  # bytes of names that are looked at at once


def write_folder_index(target: Path, choices: tuple[str, ...], entries: Sequence[ShardEntry]) -> None:
    """Writes index.json, then index.bin, from the entries and the shard indexes on disk; both are renamed.

    UserError where the index of a shard is not that of its entry.
    """
    totals = {
        "format": FORMAT,
        "fingerprint": fingerprint([(entry.name, bytes.fromhex(entry.sha256)) for entry in entries]),
        "samples": sum(entry.samples for entry in entries),
        "captions": {choice: sum(entry.captions[choice] for entry in entries) for choice in choices},
    }
    document = {**totals, "shards": [plain(entry) for entry in entries]}
    write_text(target / ENTRIES_FILE, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    names = [entry.name.encode("utf-8", "surrogateescape") for entry in entries]
    samples = np.array([entry.samples for entry in entries], np.int64)
    table: dict[str, np.ndarray | Stream] = {
        "samples": samples,
        "sample_ends": np.cumsum(samples),
        "bytes": np.array([entry.bytes for entry in entries], np.int64),
        "mtime_ns": np.array([entry.mtime_ns for entry in entries], np.int64),
        "sha256": np.frombuffer(b"".join(bytes.fromhex(e.sha256) for e in entries), np.uint8).reshape(-1, 32),
        "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        "names": np.frombuffer(b"".join(names), np.uint8),
    }
    write_columns(target / COLUMNS_FILE, totals, table | _of_samples(target, choices, entries))


def _of_samples(
    target: Path, choices: tuple[str, ...], entries: Sequence[ShardEntry]
) -> dict[str, np.ndarray | Stream]:
    """The columns gathered from the shard indexes: streamed, as all samples may not fit in memory."""
    more: dict[str, list[np.ndarray]] = {choice: [] for choice in choices}
    classes = False
    for entry in entries:
        arrays = _rows_of(target, entry)
        classes = classes or bool((arrays["class"] >= 0).any())
        for choice in choices:
            exact = np.bincount(arrays[f"captions/{choice}"], minlength=2)
            more[choice].append(exact[:0:-1].cumsum()[::-1])  # with more than 0, 1, … captions
    samples = sum(entry.samples for entry in entries)

    def stream(name: str, dtype: type) -> Stream:
        chunks = (_rows_of(target, entry)[name] for entry in entries)
        return Stream(np.dtype(dtype), (samples,), chunks)

    columns: dict[str, np.ndarray | Stream] = {"classes": stream("class", np.int32)} if classes else {}
    for choice, rows in more.items():
        depth = max(map(len, rows), default=1)
        table = np.zeros((depth, len(entries)), np.int32)
        for number, row in enumerate(rows):
            table[: len(row), number] = row
        columns[f"more_than/{choice}"] = table
        columns[f"captions/{choice}"] = stream(f"captions/{choice}", np.uint8 if depth < 256 else np.int32)
    return columns


def _rows_of(target: Path, entry: ShardEntry) -> dict[str, np.ndarray]:
    path = shard_index_path(target, entry.name)
    try:
        meta, arrays = read_shard_index(path)
    except (OSError, BrokenColumns) as error:
        raise UserError(
            f"the index of {entry.name} cannot be read: {error}; index the folder again"
        ) from None
    if meta["sha256"] != entry.sha256:
        raise UserError(f"{path} does not match its shard: another process is indexing this folder")
    return arrays


def fingerprint(shards: Sequence[tuple[str, bytes]]) -> str:
    """One hash over names and content hashes, in order: no folders, no times."""
    digest = hashlib.sha256()
    for name, content in shards:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + content)
    return digest.hexdigest()


@dataclass(frozen=True)
class IndexedFolder:
    """A folder, its index and the choices of captions asked for (None: the index's first, none is needed);
    `taken` are the numbers of the shards taken, in the order of the index (None: all).

    Of a remote folder `index` is a local one, and `remote_index` where the index of each shard is fetched
    from (None: it is in `index`).
    """

    folder: Path | RemoteFolder
    index: Path
    choices: tuple[str, ...] | None
    taken: tuple[int, ...] | None = None
    remote_index: RemoteFolder | None = None

    @property
    def command(self) -> str:
        """The command that indexes this folder, with the index where it is, but not in the cache."""
        place = "FOLDER" if self.remote_index is not None else self.index
        option = "" if place == self.folder else f" --index {place}"
        return f"clipcluster shards index {self.folder}{option}"


def read_folder_index(indexed: IndexedFolder) -> Columns:
    """The mapped list of a folder's index. UserError, with the command that helps: no index, a damaged or
    older one, one without a choice of captions that is asked for.
    """
    folder, path = indexed.folder, indexed.index / COLUMNS_FILE
    command = indexed.command
    try:
        table = read_columns(path, _check)
    except (FileNotFoundError, NotADirectoryError):
        if isinstance(folder, Path):
            find_shards(folder)
        where = f" in {indexed.index}" if indexed.index != folder else ""
        raise UserError(f"{folder}: these shards have no index{where}; make it with: {command}") from None
    except BrokenColumns as error:
        raise UserError(f"{path} cannot be used: {error}; rebuild it with: {command}") from None
    have = list(table.meta["captions"])
    missing = [choice for choice in indexed.choices or () if choice not in have]
    if missing:
        near = difflib.get_close_matches(missing[0], have, 1)
        options = "".join(f" --captions {shlex.quote(choice)}" for choice in missing)
        where = "where the samples have that field, " * (":" in missing[0])
        raise UserError(
            f"{folder}: the index counts captions by {', '.join(map(repr, have))}, the source asks for "
            f"{', '.join(map(repr, missing))}"
            + (f" (do you mean {near[0]!r}?)" if near else "")
            + f"; {where}add {'it' if len(missing) == 1 else 'them'} with: {command}{options}"
        )
    return table


def _check(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """ValueError where totals and columns do not fit each other; those by sample are not looked at."""
    if meta["format"] != FORMAT:
        raise ValueError(f"it has another format ({meta['format']})")
    samples, choices, shards = meta["samples"], meta["captions"], len(arrays["samples"])
    if not isinstance(meta["fingerprint"], str) or not choices:
        raise ValueError("it has no fingerprint, or counts no captions")
    if not all(type(total) is int and total >= 0 for total in (samples, *choices.values())):
        raise ValueError("its totals are no numbers")
    for name in ("samples", "sample_ends", "bytes", "mtime_ns", "name_ends"):
        require(arrays, name, (shards,), np.int64)
    require(arrays, "sha256", (shards, 32), np.uint8)
    require(arrays, "names", (len(arrays["names"]),), np.uint8)
    if "classes" in arrays:
        require(arrays, "classes", (samples,), np.int32)
    for choice in choices:
        require(arrays, f"captions/{choice}", (samples,), np.uint8, np.int32)
        depth = len(arrays[f"more_than/{choice}"])
        require(arrays, f"more_than/{choice}", (max(1, depth), shards), np.int32)
    sample_end = name_end = 0
    for low in range(0, shards, _CHUNK):
        part = slice(low, low + _CHUNK)
        counts, ends, names = arrays["samples"][part], arrays["sample_ends"][part], arrays["name_ends"][part]
        if counts.min() < 0 or counts.max() > samples or (sample_end + np.cumsum(counts) != ends).any():
            raise ValueError("sample_ends is no sum of samples")
        if names[0] <= name_end or (np.diff(names) <= 0).any() or arrays["bytes"][part].min() < 0:
            raise ValueError("a name or a size is missing")
        for choice in choices:
            more = np.concatenate([counts[None], arrays[f"more_than/{choice}"][:, part]])
            if more.min() < 0 or (np.diff(more, axis=0) > 0).any():
                raise ValueError("more captions are counted than before, or than there are samples")
        sample_end, name_end = int(ends[-1]), int(names[-1])
    text = arrays["names"]
    if sample_end != samples or name_end != len(text):
        raise ValueError("its sums are not those of its columns")
    parts = (text[low : low + _SCAN].tobytes() for low in range(0, len(text), _SCAN))
    if any(b"/" in part or b"\0" in part for part in parts):
        raise ValueError("a shard's name is a path")
