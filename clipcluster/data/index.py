"""The index of a folder of shards: where every sample begins, its captions' number, what the bytes hash to.

Beside the tars, or in a folder of its own for shards that cannot be written to:

    SHARD.tar.idx   one row a sample: offsets and sizes of image and captions, caption count, class
    index.json      for people: the list of shards with samples, captions, bytes, sha256, mtime_ns
    index.bin       the same list as mapped columns, and every sample's caption count; written last

It is built from the tars themselves: a header scan, the small members, one hash pass.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.data import captions
from clipcluster.data.columns import BrokenColumns, Columns, read_columns, write_columns
from clipcluster.data.tar import BrokenTar, Member, scan
from clipcluster.errors import UserError

FORMAT = 1
LIST = "index.json"
TABLE = "index.bin"
IMAGE_EXTENSIONS = frozenset(
    ["jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm", "jp2", "img"]
)
NO_TEXT, JSON, TXT = 0, 1, 2  # the member a sample's captions come from

_NAME = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)
_ABOUT_THE_TAR = re.compile(r"(^|/)__[^/]*__($|/)")
_HASH_CHUNK = 4 << 20
_ROW = {
    "offset": np.int64,
    "image_offset": np.int64,
    "image_size": np.int64,
    "text_offset": np.int64,
    "text_size": np.int64,
    "text_kind": np.uint8,
    "captions": np.int32,
    "class": np.int32,
}


@dataclass(frozen=True)
class ShardEntry:
    """One line of the folder's list. `broken` says from where on the tar could not be read, or is None."""

    name: str
    samples: int
    captions: int
    bytes: int
    sha256: str
    mtime_ns: int
    without_caption: int = 0
    without_image: int = 0
    broken: str | None = None


@dataclass(frozen=True)
class IndexSummary:
    """What an index holds, for the command's answer."""

    folder: Path
    index: Path
    captions_choice: str
    shards: int
    samples: int
    captions: int
    bytes: int
    without_caption: int
    without_image: int
    broken: list[dict[str, str]] = field(default_factory=list)


def sample_name(member: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member, split as WebDataset does; None if it belongs to no sample."""
    match = _NAME.match(member)
    if match is None or _ABOUT_THE_TAR.search(member):
        return None
    return match.group(1), match.group(2).lower()


class ShardRows:
    """Collects the rows of one shard while its members go by in tar order.

    A sample is a run of members with one key; an extension that comes again begins the next sample. A run
    without an image is counted, and is no sample.
    """

    def __init__(self, choice: str) -> None:
        self.choice = choice
        self.rows: list[tuple[int, ...]] = []
        self.without_image = 0
        self._key = ""
        self._members: dict[str, tuple[Member, Callable[[], bytes]]] = {}

    def add(self, member: Member, read: Callable[[], bytes]) -> None:
        """Takes the next member; `read` gives its bytes and is called for the small ones alone."""
        name = sample_name(member.name)
        if name is None:
            return
        key, extension = name
        if key != self._key or extension in self._members:
            self._finish_sample()
        self._key = key
        self._members[extension] = (member, read)

    def finish(self) -> dict[str, np.ndarray]:
        """The columns, each (samples,)."""
        self._finish_sample()
        columns = zip(*self.rows, strict=True) if self.rows else repeat((), len(_ROW))
        arrays = {
            name: np.array(values, dtype)
            for (name, dtype), values in zip(_ROW.items(), columns, strict=False)
        }
        arrays["captions"] = narrow(arrays["captions"])
        return arrays

    def _finish_sample(self) -> None:
        members, self._members = self._members, {}
        if not members:
            return
        image = next((member for name, (member, _) in members.items() if name in IMAGE_EXTENSIONS), None)
        if image is None:
            self.without_image += 1
            return
        first = next(iter(members.values()))[0]
        kind, text, count = self._texts(members)
        at, size = (text.offset, text.size) if text else (0, 0)
        self.rows.append((first.start, image.offset, image.size, at, size, kind, count, _class(members)))

    def _texts(
        self, members: dict[str, tuple[Member, Callable[[], bytes]]]
    ) -> tuple[int, Member | None, int]:
        for kind, extension, texts_of in (
            (JSON, "json", captions.from_json),
            (TXT, "txt", captions.from_txt),
        ):
            if extension in members:
                member, read = members[extension]
                texts = texts_of(read(), self.choice)
                if texts:
                    return kind, member, len(texts)
        return NO_TEXT, None, 0


def _class(members: dict[str, tuple[Member, Callable[[], bytes]]]) -> int:
    """The decimal number in `cls`, or -1."""
    if "cls" not in members:
        return -1
    text = members["cls"][1]().strip()
    return int(text) if text.isdigit() and len(text) < 10 else -1


def narrow(counts: np.ndarray) -> np.ndarray:
    """Caption counts as uint8 where they fit, else int32."""
    return counts.astype(np.uint8 if counts.size == 0 or counts.max() < 256 else np.int32)


def shard_index(folder: Path, shard: str) -> Path:
    """The file of one shard's rows."""
    return folder / f"{shard}.idx"


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def scan_shard(path: Path, choice: str) -> tuple[ShardRows, dict[str, np.ndarray], str | None]:
    """Rows and columns of a tar, and why it is broken (None if it is whole)."""
    rows, broken = ShardRows(choice), None
    fd = os.open(path, os.O_RDONLY)
    try:
        try:
            for member in scan(fd):
                rows.add(member, partial(os.pread, fd, member.size, member.offset))
        except BrokenTar as error:
            broken = str(error)
        return rows, rows.finish(), broken
    finally:
        os.close(fd)


def index_shard(path: Path, index: Path, choice: str) -> tuple[ShardEntry, np.ndarray]:
    """Scans and hashes one tar and writes its rows; returns its entry and caption counts (samples,)."""
    before = path.stat()
    rows, columns, broken = scan_shard(path, choice)
    digest = file_sha256(path)
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(
            f"{path} changed while it was being indexed; wait until it is written, then index again"
        )
    return write_rows(path, index, choice, digest, rows, columns, broken), columns["captions"]


def write_rows(
    path: Path,
    index: Path,
    choice: str,
    digest: str,
    rows: ShardRows,
    columns: dict[str, np.ndarray],
    broken: str | None = None,
) -> ShardEntry:
    """Writes the rows of the shard at `path`, whose sha256 is `digest`; returns its entry."""
    return write_columns_of_shard(
        path, index, choice, digest, columns, without_image=rows.without_image, broken=broken
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
    counts = narrow(np.asarray(columns["captions"], np.int32))
    if set(columns) != set(_ROW) or any(len(column) != len(counts) for column in columns.values()):
        raise ValueError(f"the columns are {', '.join(_ROW)}, all of one length")
    state = path.stat()
    meta = {"format": FORMAT, "shard": path.name, "sha256": digest, "captions": choice}
    ready = {name: np.asarray(columns[name], dtype) for name, dtype in _ROW.items()} | {"captions": counts}
    write_columns(shard_index(index, path.name), meta, ready)
    return ShardEntry(
        name=path.name,
        samples=len(counts),
        captions=int(counts.sum(dtype=np.int64)),
        bytes=state.st_size,
        sha256=digest,
        mtime_ns=state.st_mtime_ns,
        without_caption=int((counts == 0).sum()),
        without_image=without_image,
        broken=broken,
    )


def find_shards(folder: Path) -> list[Path]:
    """The tars of a folder by name; UserError if there is no such folder, or none in it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder that holds .tar shards")
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    tars = [folder / name for name in names if name.endswith(".tar")]
    if tars:
        return tars
    packed = [name for name in names if name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz"))]
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


def write_index(
    folder: Path,
    index: Path | None = None,
    captions_choice: str | None = None,
    *,
    again: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> IndexSummary:
    """Indexes every tar of a folder; into `index` if the folder cannot be written to.

    A shard of the same size, mtime and choice keeps its rows unless `again`. `progress(done, total)` is
    called after every shard. UserError: no folder, no shards, unknown choice, a place that cannot be written.
    """
    shards, target = find_shards(folder), index or folder
    choice = captions.choice_for(folder, captions_choice)
    try:
        target.mkdir(parents=True, exist_ok=True)
        known = {} if again else _reusable(target, choice)
        entries, counts = _index_all(shards, target, choice, known, workers, progress)
        write_list(target, choice, entries, counts)
    except PermissionError as error:
        raise UserError(
            f"{target} cannot be written to ({error.strerror}: {error.filename}); put the index elsewhere: "
            f"clipcluster shards index {folder} --index FOLDER"
        ) from None
    return summary(folder, target, choice, entries)


def _index_all(
    shards: Sequence[Path],
    target: Path,
    choice: str,
    known: dict[str, ShardEntry],
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[ShardEntry], list[np.ndarray]]:
    done: dict[str, tuple[ShardEntry, np.ndarray]] = {}
    for path in shards:
        kept = _kept(path, target, known.get(path.name))
        if kept is not None:
            done[path.name] = kept
    todo = [path for path in shards if path.name not in done]
    for count, (path, result) in enumerate(
        zip(todo, _run(todo, target, choice, workers), strict=True), len(done) + 1
    ):
        done[path.name] = result
        if progress is not None:
            progress(count, len(shards))
    results = [done[path.name] for path in shards]
    return [entry for entry, _ in results], [counts for _, counts in results]


def _run(todo: Sequence[Path], target: Path, choice: str, workers: int) -> Any:
    if workers <= 1 or len(todo) < 2:
        return map(index_shard, todo, repeat(target), repeat(choice))
    pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=get_context("spawn"))
    results = pool.map(index_shard, todo, repeat(target), repeat(choice))
    pool.shutdown(wait=False)
    return results


def read_summary(folder: Path, index: Path | None = None) -> IndexSummary:
    """What an index on disk holds, from its list. UserError if there is none that can be read."""
    target = index or folder
    choice, entries = _list(target)
    if choice is None:
        raise UserError(f"{target}: no index there; make it with: clipcluster shards index {folder}")
    return summary(folder, target, choice, list(entries.values()))


def _list(target: Path) -> tuple[str | None, dict[str, ShardEntry]]:
    """Captions choice and entries by name of the list at `target`; (None, {}) if it cannot be read."""
    try:
        document = json.loads((target / LIST).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            return None, {}
        return document["captions_choice"], {
            entry["name"]: ShardEntry(**entry) for entry in document["shards"]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None, {}


def _reusable(target: Path, choice: str) -> dict[str, ShardEntry]:
    """The entries of an index that is there already, if it was made for this choice."""
    made_for, entries = _list(target)
    return entries if made_for == choice else {}


def _kept(path: Path, target: Path, entry: ShardEntry | None) -> tuple[ShardEntry, np.ndarray] | None:
    """An entry and its counts, if the shard looks unchanged and its rows are those of the entry."""
    state = path.stat()
    if entry is None or (state.st_size, state.st_mtime_ns) != (entry.bytes, entry.mtime_ns):
        return None
    try:
        rows = read_columns(shard_index(target, path.name))
    except (OSError, BrokenColumns):
        return None
    if rows.meta.get("format") != FORMAT or rows.meta.get("sha256") != entry.sha256:
        return None
    return entry, rows.arrays["captions"]


def write_list(
    target: Path, choice: str, entries: Sequence[ShardEntry], counts: Sequence[np.ndarray]
) -> None:
    """Writes index.json, then index.bin, each aside and renamed; `counts` are the shards' caption counts."""
    totals = {
        "format": FORMAT,
        "captions_choice": choice,
        "fingerprint": fingerprint([(entry.name, bytes.fromhex(entry.sha256)) for entry in entries]),
        "samples": sum(entry.samples for entry in entries),
        "captions": sum(entry.captions for entry in entries),
    }
    document = {**totals, "shards": [_plain(entry) for entry in entries]}
    _write_text(target / LIST, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    names = [entry.name.encode("utf-8", "surrogateescape") for entry in entries]
    all_counts = (
        np.concatenate([narrow(np.asarray(c, np.int32)) for c in counts]) if counts else np.zeros(0, np.uint8)
    )
    table: dict[str, np.ndarray] = {
        "samples": np.array([entry.samples for entry in entries], np.int64),
        "bytes": np.array([entry.bytes for entry in entries], np.int64),
        "mtime_ns": np.array([entry.mtime_ns for entry in entries], np.int64),
        "sha256": np.frombuffer(b"".join(bytes.fromhex(e.sha256) for e in entries), np.uint8).reshape(-1, 32),
        "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "caption_counts": all_counts,
    }
    write_columns(target / TABLE, totals, table)


def _plain(entry: ShardEntry) -> dict[str, Any]:
    """An entry without the fields that say nothing."""
    return {
        name: value
        for name, value in vars(entry).items()
        if value not in (None, 0) or name in ("samples", "captions")
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


def summary(folder: Path, target: Path, choice: str, entries: Sequence[ShardEntry]) -> IndexSummary:
    """The sums over a list of shards."""
    return IndexSummary(
        folder=folder,
        index=target,
        captions_choice=choice,
        shards=len(entries),
        samples=sum(entry.samples for entry in entries),
        captions=sum(entry.captions for entry in entries),
        bytes=sum(entry.bytes for entry in entries),
        without_caption=sum(entry.without_caption for entry in entries),
        without_image=sum(entry.without_image for entry in entries),
        broken=[{"shard": entry.name, "reason": entry.broken} for entry in entries if entry.broken],
    )


def read_table(folder: Path, target: Path, *, captions_choice: str | None) -> Columns:
    """The mapped list of a folder's index at `target`.

    `captions_choice` is the one the source asks for, None if it needs no captions. UserError, with the
    command that makes it: no index, a damaged or older one, one made for another choice.
    """
    place = "" if target == folder else f" --index {target}"
    command = f"clipcluster shards index {folder}{place}"
    try:
        table = read_columns(target / TABLE)
    except FileNotFoundError:
        find_shards(folder)
        where = f" in {target}" if place else ""
        raise UserError(f"{folder}: these shards have no index{where}; make it with: {command}") from None
    except BrokenColumns as error:
        raise UserError(f"{error}; make it again with: {command}") from None
    if table.meta.get("format") != FORMAT:
        raise UserError(
            f"{target / TABLE} has another format ({table.meta.get('format')}); make it again with: {command}"
        )
    if captions_choice is not None and table.meta["captions_choice"] != captions_choice:
        raise UserError(
            f"{folder}: the index counts captions by {table.meta['captions_choice']!r}, the source asks for "
            f"{captions_choice!r}; make it with: {command} --captions {captions_choice}"
        )
    return table
