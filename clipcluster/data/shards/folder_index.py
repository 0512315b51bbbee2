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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.data.shards import captions
from clipcluster.data.shards.captions import JSON, NO_TEXT, TXT
from clipcluster.data.shards.columns import BrokenColumns, Columns, Stream, read_columns, write_columns
from clipcluster.data.shards.shard_index import (
    FORMAT,
    IMAGE_EXTENSIONS,
    OF_CAPTIONS,
    ShardRows,
    column,
    narrow,
    sample_name,
    scan_shard,
    shard_index,
    write_columns_of,
)
from clipcluster.data.storage.urls import RemoteFolder
from clipcluster.errors import UserError

__all__ = [
    "FORMAT",
    "IMAGE_EXTENSIONS",
    "JSON",
    "NO_TEXT",
    "TXT",
    "ShardRows",
    "column",
    "narrow",
    "sample_name",
    "scan_shard",
    "shard_index",
]

LIST = "index.json"
TABLE = "index.bin"

_HASH_CHUNK = 4 << 20
_PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".tar.lz4")


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


def index_shard(
    path: Path, index: Path, choices: str | Sequence[str], digest: str | None = None
) -> ShardEntry:
    """Scans and hashes one tar and writes its rows; returns its entry.

    With `digest`, its known sha256, it is not hashed. UserError: it changed meanwhile, or is compressed.
    """
    before = path.stat()
    rows, columns, broken = scan_shard(path, choices)
    digest = digest or file_sha256(path)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(
            f"{path} changed while it was being indexed; wait until it is written, then index again"
        )
    return write_rows(path, index, rows.choices, digest, rows, columns, broken)


def write_rows(
    path: Path,
    index: Path,
    choices: str | Sequence[str],
    digest: str,
    rows: ShardRows,
    columns: Mapping[str, np.ndarray],
    broken: str | None = None,
) -> ShardEntry:
    """Writes the rows of the shard at `path`, whose sha256 is `digest`; returns its entry."""
    choices = (choices,) if isinstance(choices, str) else tuple(choices)
    write_columns_of(shard_index(index, path.name), path.name, digest, choices, columns)
    state = path.stat()
    counts = {choice: columns[column("captions", choice)] for choice in choices}
    return ShardEntry(
        name=path.name,
        samples=len(columns["offset"]),
        captions={choice: int(of.sum(dtype=np.int64)) for choice, of in counts.items()},
        bytes=state.st_size,
        sha256=digest,
        mtime_ns=state.st_mtime_ns,
        without_caption={choice: int((of == 0).sum()) for choice, of in counts.items() if not of.all()},
        without_image=rows.without_image,
        duplicates=rows.duplicates,
        broken=broken,
    )


def write_columns_of_shard(
    path: Path,
    index: Path,
    choice: str,
    digest: str,
    columns: Mapping[str, np.ndarray],
    without_image: int = 0,
    broken: str | None = None,
) -> ShardEntry:
    """Writes the rows of the shard at `path` from columns made in bulk; returns its entry.

    columns: `offset`, `image_offset`, `image_size`, `text_offset`, `text_size` (int64, bytes), `text_kind`
    (uint8: NO_TEXT, JSON or TXT), `captions` and `class` (int32, -1: none), each (samples,). ValueError
    where one is missing or has another length.
    """
    named = {
        column(name, choice) if name in OF_CAPTIONS else name: np.asarray(values)
        for name, values in columns.items()
    }
    rows = ShardRows(choice)
    rows.without_image = without_image
    return write_rows(path, index, choice, digest, rows, named, broken)


def find_shards(folder: Path) -> list[Path]:
    """The tars of a folder by name; UserError if there is no such folder, or none in it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder that holds .tar shards")
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    tars = [folder / name for name in names if name.endswith(".tar")]
    if tars:
        return tars
    packed = _packed(folder)
    if packed:
        raise UserError(
            f"{folder}: {packed[0]} is compressed and cannot be read by offset; unpack it to .tar first"
        )
    below = [name for name in names if next((folder / name).glob("*.tar"), None) is not None]
    if below:
        raise UserError(f"{folder}: the shards lie in its folders {', '.join(below[:5])}; give one of them")
    raise UserError(
        f"{folder}: no .tar shards in this folder; shards are made by: clipcluster shards convert"
    )


def _packed(folder: Path) -> list[str]:
    """Names of compressed tars, by name; they cannot be read by offset."""
    names = (entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    return sorted(name for name in names if name.endswith(_PACKED))


def write_index(
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
    have, known = _list(target)
    choices = tuple(dict.fromkeys([*have, *map(captions.check_choice, asked)]))
    choices = choices or (captions.choice_for(folder, None),)
    try:
        target.mkdir(parents=True, exist_ok=True)
        entries = _index_all(shards, target, choices, {} if again else known, workers, progress)
        write_list(target, choices, entries)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--index {target}: a file has this name; give a folder") from None
    except PermissionError as error:
        if Path(str(error.filename)) in shards:
            raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None
        raise UserError(
            f"{target} cannot be written to ({error.strerror}: {error.filename}); put the index elsewhere: "
            f"clipcluster shards index {folder} --index FOLDER"
        ) from None
    return summary(folder, target, choices, entries)


def _index_all(
    shards: Sequence[Path],
    target: Path,
    choices: tuple[str, ...],
    known: dict[str, ShardEntry],
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> list[ShardEntry]:
    done: dict[str, ShardEntry] = {}
    digests: dict[str, str] = {}
    for path in shards:
        entry = known.get(path.name)
        state = path.stat()
        if entry is None or (state.st_size, state.st_mtime_ns) != (entry.bytes, entry.mtime_ns):
            continue
        digests[path.name] = entry.sha256
        if _has_rows(target, entry, choices):
            done[path.name] = entry
    todo = [path for path in shards if path.name not in done]
    for count, (path, made) in enumerate(
        zip(todo, _run(todo, target, choices, digests, workers), strict=True), len(done) + 1
    ):
        done[path.name] = made
        if progress is not None:
            progress(count, len(shards))
    return [done[path.name] for path in shards]


def _run(
    todo: Sequence[Path], target: Path, choices: tuple[str, ...], digests: Mapping[str, str], workers: int
) -> Iterator[ShardEntry]:
    known = [digests.get(path.name) for path in todo]
    if workers <= 1 or len(todo) < 2:
        return map(index_shard, todo, repeat(target), repeat(choices), known)
    from concurrent.futures import ProcessPoolExecutor  # here: 3 MB that no loader worker needs
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=get_context("spawn"))
    results = pool.map(index_shard, todo, repeat(target), repeat(choices), known)
    pool.shutdown(wait=False)
    return results


def read_summary(folder: Path, index: Path | None = None) -> IndexSummary:
    """What an index on disk holds, from its list. UserError if there is none that can be read."""
    target = index or folder
    choices, entries = _list(target)
    if not choices or any(set(entry.captions) != set(choices) for entry in entries.values()):
        raise UserError(f"{target}: no index there; make it with: clipcluster shards index {folder}")
    return summary(folder, target, choices, list(entries.values()))


def read_entries(target: Path) -> dict[str, ShardEntry]:
    """The shards of the list at `target`, by name; none if it cannot be read."""
    return _list(target)[1]


def _list(target: Path) -> tuple[tuple[str, ...], dict[str, ShardEntry]]:
    """Choices of captions and entries by name of the list at `target`; ((), {}) if it cannot be read.

    Of a list of format 1 the hashes are taken over, so that the index is made anew without reading all.
    """
    try:
        document = json.loads((target / LIST).read_text(encoding="utf-8"))
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


def _has_rows(target: Path, entry: ShardEntry, choices: tuple[str, ...]) -> bool:
    """Whether the rows on disk are those of the entry, for every choice."""
    if set(entry.captions) != set(choices):
        return False
    try:
        meta = read_columns(shard_index(target, entry.name)).meta
    except (OSError, BrokenColumns):
        return False
    return (
        meta.get("format") == FORMAT
        and meta.get("sha256") == entry.sha256
        and set(choices) == set(meta["choices"])
    )


def write_list(target: Path, choices: str | Sequence[str], entries: Sequence[ShardEntry]) -> None:
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
    _write_text(target / LIST, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
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
    write_columns(target / TABLE, totals, table | _of_samples(target, choices, entries))


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
            more[choice].append(_more_than(arrays[column("captions", choice)]))
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
        columns[column("captions", choice)] = stream(
            column("captions", choice), np.uint8 if depth < 256 else np.int32
        )
    return columns


def _rows_of(target: Path, entry: ShardEntry) -> dict[str, np.ndarray]:
    path = shard_index(target, entry.name)
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


def summary(
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
        left_out=_packed(folder) if isinstance(folder, Path) and folder.is_dir() else [],
    )


def read_table(
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
        table = read_columns(target / TABLE)
    except (FileNotFoundError, NotADirectoryError):
        if isinstance(folder, Path):
            find_shards(folder)
        where = f" in {target}" if place else ""
        raise UserError(f"{folder}: these shards have no index{where}; make it with: {command}") from None
    except BrokenColumns as error:
        raise UserError(f"{error}; make it again with: {command}") from None
    if table.meta.get("format") != FORMAT:
        raise UserError(
            f"{target / TABLE} has another format ({table.meta.get('format')}); make it again with: {command}"
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
