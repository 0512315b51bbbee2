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
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.data.shards.columns import BrokenColumns, Columns, Stream, read_columns, write_columns
from clipcluster.data.shards.find import compressed_tars, find_shards
from clipcluster.data.shards.shard_index import FORMAT, caption_column, shard_index_path
from clipcluster.data.storage.urls import RemoteFolder
from clipcluster.errors import UserError

ENTRIES_FILE = "index.json"
COLUMNS_FILE = "index.bin"

_HASH_CHUNK = 4 << 20


@dataclass(frozen=True)
class ShardEntry:
    """One line of the folder's list. `broken` says from where on the tar could not be read, or is None.

    `captions` and `without_caption` (samples) are by choice; `duplicates` are samples whose key came before.
    """

    name: str
    samples: int
    captions: dict[str, int]
    bytes: int
    sha256: str
    mtime_ns: int
    without_caption: dict[str, int] = field(default_factory=dict)
    without_image: int = 0
    duplicates: int = 0
    broken: str | None = None


@dataclass(frozen=True)
class ChoiceCounts:
    """What one choice of captions finds in a folder: captions, samples with one (`used`) and without."""

    captions: int
    used: int
    without_caption: int


@dataclass(frozen=True)
class IndexSummary:
    """What an index holds, for the command's answer.

    `captions`, `used` and `without_caption` are those of `captions_choice`, the index's first; `choices` has
    every choice. All the tars hold is samples + without_image + duplicates. `left_out` are compressed tars.
    """

    folder: Path | str
    index: Path
    captions_choice: str
    shards: int
    samples: int
    captions: int
    bytes: int
    used: int
    without_caption: int
    without_image: int
    duplicates: int
    choices: dict[str, ChoiceCounts]
    broken: list[dict[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_summary(folder: Path, index: Path | None = None) -> IndexSummary:
    """What an index on disk holds, from its list. UserError if there is none that can be read."""
    target = index or folder
    choices, entries = read_list(target)
    if not choices or any(set(entry.captions) != set(choices) for entry in entries.values()):
        raise UserError(f"{target}: no index there; make it with: clipcluster shards index {folder}")
    return summarize(folder, target, choices, list(entries.values()))


def read_entries(target: Path) -> dict[str, ShardEntry]:
    """The shards of the list at `target`, by name; none if it cannot be read."""
    return read_list(target)[1]


def read_list(target: Path) -> tuple[tuple[str, ...], dict[str, ShardEntry]]:
    """Choices of captions and entries by name of the list at `target`; ((), {}) if it cannot be read.

    Of a list of format 1 the hashes are taken over, so that the index is made anew without reading all.
    """
    try:
        document = json.loads((target / ENTRIES_FILE).read_text(encoding="utf-8"))
        if document["format"] == 1:
            entries = [
                ShardEntry(**{**entry, "captions": {}, "without_caption": {}}) for entry in document["shards"]
            ]
            return (document["captions_choice"],), {entry.name: entry for entry in entries}
        if document["format"] != FORMAT:
            return (), {}
        return tuple(document["captions"]), {
            entry["name"]: ShardEntry(**entry) for entry in document["shards"]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return (), {}


def write_folder_index(target: Path, choices: str | Sequence[str], entries: Sequence[ShardEntry]) -> None:
    """Writes index.json, then index.bin, each aside and renamed, from the entries and the rows on disk.

    UserError where the rows of a shard are not those of its entry.
    """
    choices = (choices,) if isinstance(choices, str) else tuple(choices)
    totals = {
        "format": FORMAT,
        "fingerprint": fingerprint([(entry.name, bytes.fromhex(entry.sha256)) for entry in entries]),
        "samples": sum(entry.samples for entry in entries),
        "captions": {choice: sum(entry.captions[choice] for entry in entries) for choice in choices},
    }
    document = {**totals, "shards": [_plain(entry) for entry in entries]}
    _write_text(target / ENTRIES_FILE, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
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
    """The columns that are gathered from the shards' rows: streamed, as all samples need not fit memory."""
    more: dict[str, list[np.ndarray]] = {choice: [] for choice in choices}
    classes = False
    for entry in entries:
        arrays = _rows_of(target, entry)
        classes = classes or bool((arrays["class"] >= 0).any())
        for choice in choices:
            more[choice].append(_more_than(arrays[caption_column("captions", choice)]))
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
        columns[caption_column("captions", choice)] = stream(
            caption_column("captions", choice), np.uint8 if depth < 256 else np.int32
        )
    return columns


def _rows_of(target: Path, entry: ShardEntry) -> dict[str, np.ndarray]:
    path = shard_index_path(target, entry.name)
    try:
        meta, arrays = read_columns(path)
    except (OSError, BrokenColumns) as error:
        raise UserError(f"the rows of {entry.name} cannot be read: {error}; index the folder again") from None
    if meta.get("format") != FORMAT or meta.get("sha256") != entry.sha256:
        raise UserError(f"{path} is of other bytes than its shard: somebody else indexes this folder too")
    return arrays


def _more_than(counts: np.ndarray) -> np.ndarray:
    """Samples with more than c captions, for c = 0, 1, …: (largest count,) int64, one row at least."""
    exact = np.bincount(counts, minlength=2)
    return exact[:0:-1].cumsum()[::-1]


def _plain(entry: ShardEntry) -> dict[str, Any]:
    """An entry without the fields that say nothing."""
    return {
        name: value
        for name, value in vars(entry).items()
        if value not in (None, 0, {}) or name in ("samples", "captions", "bytes")
    }


def _write_text(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def fingerprint(shards: Sequence[tuple[str, bytes]]) -> str:
    """One hash over names and content hashes, in order: no folders, no times."""
    digest = hashlib.sha256()
    for name, content in shards:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + content)
    return digest.hexdigest()


def summarize(
    folder: Path | str, target: Path, choices: str | Sequence[str], entries: Sequence[ShardEntry]
) -> IndexSummary:
    """The sums over a list of shards."""
    choices = (choices,) if isinstance(choices, str) else tuple(choices)
    samples = sum(entry.samples for entry in entries)
    counts = {}
    for choice in choices:
        without = sum(entry.without_caption.get(choice, 0) for entry in entries)
        found = sum(entry.captions[choice] for entry in entries)
        counts[choice] = ChoiceCounts(found, samples - without, without)
    return IndexSummary(
        folder=folder,
        index=target,
        captions_choice=choices[0],
        shards=len(entries),
        samples=samples,
        **vars(counts[choices[0]]),
        bytes=sum(entry.bytes for entry in entries),
        without_image=sum(entry.without_image for entry in entries),
        duplicates=sum(entry.duplicates for entry in entries),
        choices=counts,
        broken=[{"shard": entry.name, "reason": entry.broken} for entry in entries if entry.broken],
        left_out=compressed_tars(folder) if isinstance(folder, Path) and folder.is_dir() else [],
    )


def read_folder_index(
    folder: Path | RemoteFolder,
    target: Path,
    *,
    captions_choice: str | Sequence[str] | None,
    place: str | None = None,
) -> Columns:
    """The mapped list of a folder's index at `target`.

    `captions_choice` is what the source asks for, None if it needs no captions. UserError, with the command
    that helps: no index, a damaged or older one, one without a choice that is asked for.
    """
    if place is None:
        place = "" if target == folder else f" --index {target}"
    command = f"clipcluster shards index {folder}{place}"
    try:
        table = read_columns(target / COLUMNS_FILE)
    except (FileNotFoundError, NotADirectoryError):
        if isinstance(folder, Path):
            find_shards(folder)
        where = f" in {target}" if place else ""
        raise UserError(f"{folder}: these shards have no index{where}; make it with: {command}") from None
    except BrokenColumns as error:
        raise UserError(f"{error}; make it again with: {command}") from None
    if table.meta.get("format") != FORMAT:
        raise UserError(
            f"{target / COLUMNS_FILE} has another format ({table.meta.get('format')}); "
            f"make it again with: {command}"
        )
    asked = (captions_choice,) if isinstance(captions_choice, str) else tuple(captions_choice or ())
    have = list(table.meta["captions"])
    missing = [choice for choice in asked if choice not in have]
    if missing:
        near = difflib.get_close_matches(missing[0], have, 1)
        options = "".join(f" --captions {shlex.quote(choice)}" for choice in missing)
        raise UserError(
            f"{folder}: the index counts captions by {', '.join(map(repr, have))}, the source asks for "
            f"{', '.join(map(repr, missing))}"
            + (f" (do you mean {near[0]!r}?)" if near else "")
            + f"; add {'it' if len(missing) == 1 else 'them'} with: {command}{options}"
        )
    return table
