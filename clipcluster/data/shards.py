"""Folders of shards, opened through their index and read by offset. Imports no torch.

A `Shards` is one source: its samples are numbered 0 … n_samples - 1 in the order of the shards' names. It
can be sent to another process: paths travel and which bytes were compared, the index is mapped again there.
"""

from __future__ import annotations

import glob
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np

from clipcluster.data import captions
from clipcluster.data import index as indexes
from clipcluster.data.columns import BrokenColumns, Columns, Joined, read_columns
from clipcluster.data.remote import (
    Named,
    OtherContent,
    Refused,
    RemoteFile,
    RemoteFolder,
    State,
    Unreachable,
    braces,
    folder_at,
    is_remote,
    named,
)
from clipcluster.data.tar import BrokenTar, scan
from clipcluster.errors import UserError
from clipcluster.recipe.captions import shares_of
from clipcluster.runtime.stop import DataError

if TYPE_CHECKING:
    from clipcluster.data.cache import Cache

CHECKED_SHARDS = 10_000  # more than these are compared only when a worker opens them
OPEN_SHARDS = 64  # file handles a source keeps open
_SCAN = 1 << 20  # samples looked at together
_PIECES = 64  # columns laid together without a copy
RETRIES = (0.1, 1.0, 3.0)  # seconds to wait before another try at a disk that failed
TALKS = 16  # requests to a server at once
FETCHES = 4  # shards that one reader fetches at once

_WORDS = "dataset_type.txt"  # says which captions a folder's txt members hold

T = TypeVar("T")


class SourceSection(Protocol):
    """What a recipe says of one source; paths are absolute."""

    @property
    def shards(self) -> Any: ...
    @property
    def index(self) -> str | None: ...
    @property
    def captions_in(self) -> str | Mapping[str, float] | None: ...


class Sample(NamedTuple):
    """One sample as it lies in its shard: `image` are the original bytes, `cls` is -1 if it has no class."""

    key: str
    shard: str
    image: bytes
    captions: list[str]
    cls: int


@dataclass(frozen=True)
class Part:
    """A folder, its index and the choices of captions asked for (None: the index's first, none is needed);
    `rows` are the shards taken (None: all).

    Of a remote folder `index` is a local one, and `rows_at` where its shards' rows lie (None: in `index`).
    """

    folder: Path | RemoteFolder
    index: Path
    choices: tuple[str, ...] | None
    rows: tuple[int, ...] | None = None
    rows_at: RemoteFolder | None = None

    @property
    def place(self) -> str:
        """What a command that indexes this folder says of the index's place."""
        if self.rows_at is not None:
            return " --index FOLDER"  # a copy of ours is no place for it
        return "" if self.index == self.folder else f" --index {self.index}"


class CaptionField(NamedTuple):
    """One choice of captions of a source, with its probability (None: it is the only one).

    counts: (n_samples,) integers, captions of each sample by this choice.
    """

    choice: str
    probability: float | None
    counts: np.ndarray


class _Open(NamedTuple):
    fd: int
    columns: dict[str, np.ndarray]


def open_folder(
    path: str | Path,
    index: str | Path | None = None,
    captions_in: str | Mapping[str, float] | None = None,
    *,
    cache: Cache | None = None,
) -> Shards:
    """Opens one folder of shards, which may be remote, with its captions. UserError as `open_source`."""
    shares = shares_of(captions_in)
    if is_remote(path):
        cache = cache or _default_cache()
        parts = list(_remote_parts(str(path), None if index is None else str(index), shares, cache))
        return Shards(parts, tuple(shares.values()), cache)
    folder = Path(path)
    return Shards([Part(folder, Path(index or folder), _choices(folder, shares))], tuple(shares.values()))


def open_source(source: SourceSection, *, text: bool, cache: Cache | None = None) -> Shards:
    """Opens a source of a recipe: folders, tars, globs and braces, here or remote, or a list of them.

    `text` says whether captions are needed; `cache` is where remote shards are kept. UserError: no folder, no
    shards, no index, an index for other captions (each with the command that helps), no caption anywhere, or
    a shard larger than the cache. OSError where a remote index cannot be fetched.
    """
    written = [source.shards] if isinstance(source.shards, str) else list(source.shards)
    shares = shares_of(source.captions_in) if text else None
    if cache is None and any(map(is_remote, written)):
        cache = _default_cache()
    parts = [part for entry in written for part in _parts(entry, source.index, shares, cache)]
    shards = Shards(parts, tuple(shares.values()) if shares else (None,), cache)
    if shards.n_samples == 0:
        raise UserError(f"{', '.join(written)}: the shards hold no sample with an image")
    if text:
        _require_captions(", ".join(written), shards)
    if cache is not None:
        shards.check_room(cache.size)
    return shards


def _default_cache() -> Cache:
    """The user's own; loaded here, because local shards need none of it."""
    from clipcluster.data.cache import Cache, default_folder

    return Cache(default_folder())


def _require_captions(written: str, shards: Shards) -> None:
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
) -> Iterator[Part]:
    """The folders that one written entry names, with the shards it takes of each."""
    if is_remote(entry):
        assert cache is not None
        yield from _remote_parts(entry, index, shares, cache)
        return
    if index is not None and is_remote(index):
        raise UserError(
            f"index {index!r}: the shards {entry!r} are on this machine; their index has to be too"
        )
    if entry.endswith(".tar"):
        paths = [Path(name) for pattern in braces(entry) for name in sorted(glob.glob(pattern)) or [pattern]]
    else:
        folders = [name for pattern in braces(entry) for name in sorted(glob.glob(pattern)) or [pattern]]
        for folder in map(Path, folders):
            yield Part(folder, Path(index or folder), _choices(folder, shares))
        return
    for folder in dict.fromkeys(path.parent for path in paths):
        part = Part(folder, Path(index or folder), _choices(folder, shares))
        names = {name: row for row, name in enumerate(Shards([part]).shard_names)}
        wanted = [path.name for path in paths if path.parent == folder]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise UserError(
                f"{folder / missing[0]}: not in the index of its folder ({len(missing)} of {len(wanted)} "
                f"shards are not); make it with: clipcluster shards index {folder}"
            )
        rows = tuple(sorted({names[name] for name in wanted}))
        yield replace(part, rows=rows if len(rows) < len(names) else None)


def _remote_parts(
    entry: str, index: str | None, shares: Mapping[str | None, float | None] | None, cache: Cache
) -> Iterator[Part]:
    """The same of an entry that lies elsewhere: its index is local, or fetched."""
    for taken in named(entry):
        place, rows_at = _index_of(taken, entry, index, cache)
        part = Part(taken.folder, place, _choices(place, shares), None, rows_at)
        if taken.tars is None:
            yield part
            continue
        names = {name: row for row, name in enumerate(Shards([part]).shard_names)}
        rows = tuple(sorted(names[name] for name in taken.chosen(list(names))))
        yield part if len(rows) == len(names) else replace(part, rows=rows)


def _index_of(taken: Named, entry: str, index: str | None, cache: Cache) -> tuple[Path, RemoteFolder | None]:
    """Where the index of remote shards lies here, and where the rows of each shard are fetched from."""
    command = f"clipcluster shards index {entry!r} --index FOLDER"
    if index is not None and not is_remote(index):
        if not (Path(index) / indexes.TABLE).is_file():
            raise UserError(f"{taken.folder}: there is no index in {index}; make it with: {command}")
        return Path(index), None
    at = folder_at(index) if index is not None else taken.folder
    if at.is_pipe:
        raise UserError(
            f"{entry!r}: a command cannot list its shards; make an index with: {command} and say "
            "index: FOLDER"
        )
    place = cache.index(at, indexes.TABLE, _WORDS)
    if place is None:
        raise UserError(
            f"{at}: these shards have no index ({indexes.TABLE}) there; put one beside them, or make one "
            f"here with: {command} and say index: FOLDER"
            + (" (an http server cannot list: name the tars by braces)" if taken.tars is None else "")
        )
    return place, at


class Shards:
    """A source of samples. Files are opened on first use, `OPEN_SHARDS` at most at once.

    Attributes: `name` (last component of the first folder), `fingerprint` (hash over shard names and
    contents), `sample_counts` (n_shards,) int64, `n_samples`, `n_pairs` (captions of all samples),
    `classes` (n_samples,) int32 (-1: none), `fields` (the choices of captions, with their probabilities and
    counts), `caption_counts` (n_samples,) the sum over the fields, `more_than` (C, n_shards) samples of each
    shard with more than c captions (C is 1 where there are several fields). All are mapped, and shared by the
    processes of a node, where the source is one whole folder; of several folders those by sample are too.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        probabilities: Sequence[float | None] = (None,),
        cache: Cache | None = None,
    ) -> None:
        self.parts = tuple(parts)
        self.probabilities = tuple(probabilities)
        self.cache = cache
        self.name = _name_of(self.parts[0])
        self._tables = [
            indexes.read_table(p.folder, p.index, captions_choice=p.choices, place=p.place)
            for p in self.parts
        ]
        # a part that is not cut has no list of its rows: it would be private to every process
        self._rows = [None if part.rows is None else np.array(part.rows, np.int64) for part in self.parts]
        self.sample_counts = self._of_shards("samples")
        self._part_ends = np.cumsum(
            [
                len(table.arrays["samples"] if rows is None else rows)
                for table, rows in zip(self._tables, self._rows, strict=True)
            ]
        )
        whole = len(self.parts) == 1 and self.parts[0].rows is None
        self._sample_ends = (
            self._tables[0].arrays["sample_ends"] if whole else np.cumsum(self.sample_counts, dtype=np.int64)
        )
        self.n_samples = int(self._sample_ends[-1]) if len(self._sample_ends) else 0
        self.fingerprint = self._fingerprint()
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._hashed: set[tuple[int, int]] = set()  # shard and mtime of what was found to be the same bytes

    def __getstate__(self) -> dict[str, Any]:
        return {
            "parts": self.parts,
            "probabilities": self.probabilities,
            "cache": self.cache,
            "fingerprint": self.fingerprint,
            "hashed": self._hashed,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        Shards.__init__(self, state["parts"], state["probabilities"], state["cache"])
        if self.fingerprint != state["fingerprint"]:
            raise DataError(f"the index of {self.parts[0].folder} was made anew while it was in use")
        self._hashed = state["hashed"]

    def _fingerprint(self) -> str:
        if len(self.parts) == 1 and self.parts[0].rows is None:
            return str(self._tables[0].meta["fingerprint"])
        return indexes.fingerprint(
            [(self.shard_name(i), bytes.fromhex(self.sha256(i))) for i in range(len(self))]
        )

    def __len__(self) -> int:
        """The number of shards."""
        return len(self.sample_counts)

    def _of_shards(self, name: str) -> np.ndarray:
        """A column of the shards taken, (…, n_shards); the mapped one where that is all of one folder."""
        columns = [table.arrays[name] for table in self._tables]
        taken = [
            column if rows is None else column[..., rows]
            for column, rows in zip(columns, self._rows, strict=True)
        ]
        return taken[0] if len(taken) == 1 else np.concatenate(taken, axis=-1)

    def _of_samples(self, names: Sequence[str | None], absent: int | None = None) -> np.ndarray:
        """A column of the samples of the shards taken, (n_samples,): `names` by part (None: `absent`)."""
        pieces = []
        for table, rows, name in zip(self._tables, self._rows, names, strict=True):
            ends = table.arrays["sample_ends"]
            if name is None or name not in table.arrays:
                column = np.broadcast_to(np.int32(absent or 0), (int(ends[-1]) if len(ends) else 0,))
            else:
                column = table.arrays[name]
            if rows is None:
                pieces.append(column)
            else:
                begins = ends[rows] - table.arrays["samples"][rows]
                pieces += [column[low:high] for low, high in zip(begins, ends[rows], strict=True)]
        if len(pieces) == 1:
            return pieces[0]
        # shards cut out of a folder are many small pieces: copied, they are as fast as one column
        if len(pieces) > _PIECES:
            return np.concatenate(pieces)
        return cast(np.ndarray, Joined([[piece] for piece in pieces]))

    def _choices_of(self, part: int) -> tuple[str, ...]:
        """The choices of captions read in a part: those asked for, else the index's first."""
        choices = self.parts[part].choices
        return (next(iter(self._tables[part].meta["captions"])),) if choices is None else choices

    @property
    def sample_ends(self) -> np.ndarray:
        """The running sum of `sample_counts`, (n_shards,) int64."""
        return self._sample_ends

    @cached_property
    def fields(self) -> tuple[CaptionField, ...]:
        """The choices of captions, one or several, in the order in which `read` lays their captions."""
        by_part = [self._choices_of(part) for part in range(len(self.parts))]
        return tuple(
            CaptionField(
                choices[0],
                probability,
                self._of_samples([indexes.column("captions", choice) for choice in choices]),
            )
            for choices, probability in zip(zip(*by_part, strict=True), self.probabilities, strict=True)
        )

    @cached_property
    def caption_counts(self) -> np.ndarray:
        """Captions of every sample over all fields, (n_samples,)."""
        if len(self.fields) == 1:
            return self.fields[0].counts
        return cast(np.ndarray, Joined([[field.counts for field in self.fields]]))

    @cached_property
    def classes(self) -> np.ndarray:
        """Class of every sample, (n_samples,) int32; -1 where it has none."""
        return self._of_samples(["classes"] * len(self.parts), absent=-1)

    @cached_property
    def more_than(self) -> np.ndarray:
        """Samples of each shard with more than c captions, (C, n_shards); C is 1 with several fields."""
        by_field = [self.more_than_of(number) for number in range(len(self.fields))]
        if len(by_field) == 1:
            return by_field[0]
        having = np.max([rows[0] for rows in by_field], axis=0)
        # in shards where no field alone has a caption for every sample, the samples are looked at
        partial, first = (having > 0) & (having < self.sample_counts), 0
        while partial[first:].any():
            first += int(partial[first:].argmax())
            low = int(self._sample_ends[first] - self.sample_counts[first])
            last = max(first + 1, int(np.searchsorted(self._sample_ends, low + _SCAN, side="right")))
            ends, counts = self._sample_ends[first:last] - low, self.sample_counts[first:last]
            used = np.cumsum(np.asarray(self.caption_counts[low : low + int(ends[-1])]) > 0)
            used = np.concatenate([[0], used])
            having[first:last] = used[ends] - used[ends - counts]
            first = last
        return having[None]

    def more_than_of(self, field: int) -> np.ndarray:
        """Samples of each shard with more than c captions of one field, (C, n_shards)."""
        tables = []
        for part, (table, rows) in enumerate(zip(self._tables, self._rows, strict=True)):
            column = table.arrays[indexes.column("more_than", self._choices_of(part)[field])]
            tables.append(column if rows is None else column[:, rows])
        if len(tables) == 1:
            return tables[0]
        depth = max(map(len, tables))
        return np.concatenate([np.pad(t, ((0, depth - len(t)), (0, 0))) for t in tables], axis=1)

    @cached_property
    def n_pairs(self) -> int:
        """Captions of all samples, of all fields."""
        if all(part.rows is None for part in self.parts):
            return sum(
                int(table.meta["captions"][choice])
                for part, table in enumerate(self._tables)
                for choice in self._choices_of(part)
            )
        return sum(
            int(counts[low : low + _SCAN].sum(dtype=np.int64))
            for _, _, counts in self.fields
            for low in range(0, len(counts), _SCAN)
        )

    @cached_property
    def drawable(self) -> np.ndarray | None:
        """Positions of the samples with a caption, int64; None if every sample has one."""
        if int(self.more_than[0].sum(dtype=np.int64)) == self.n_samples:
            return None
        return np.flatnonzero(np.asarray(self.caption_counts))

    @property
    def shard_names(self) -> list[str]:
        return [self.shard_name(shard) for shard in range(len(self))]

    @property
    def classnames(self) -> list[str] | None:
        """The lines of `classnames.txt` beside the tars or in the folder above; None if there is none."""
        return self._lines("classnames.txt")

    @property
    def templates(self) -> list[str] | None:
        """The lines of `zeroshot_classification_templates.txt`, each with `{c}`; None if there is none."""
        return self._lines("zeroshot_classification_templates.txt")

    def _lines(self, name: str) -> list[str] | None:
        folder = self.parts[0].folder
        if isinstance(folder, RemoteFolder):
            return self._remote_lines(name, folder)
        for path in (folder / name, folder.parent / name):
            if path.is_file():
                return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return None

    def _remote_lines(self, name: str, folder: RemoteFolder) -> list[str] | None:
        """The same of a remote folder: of the copy beside a local index, else of the server."""
        local = self.parts[0].index / name
        if local.is_file():
            data: bytes | None = local.read_bytes()
        else:
            from clipcluster.data.download import read_beside

            data = read_beside(folder, name)
        return None if data is None else [line for line in data.decode().splitlines() if line.strip()]

    def _place(self, shard: int) -> tuple[int, int]:
        """Part, and row in its table."""
        part = int(np.searchsorted(self._part_ends, shard, side="right"))
        first = int(self._part_ends[part - 1]) if part else 0
        rows = self._rows[part]
        return part, shard - first if rows is None else int(rows[shard - first])

    def shard_name(self, shard: int) -> str:
        part, row = self._place(shard)
        arrays = self._tables[part].arrays
        begin = int(arrays["name_ends"][row - 1]) if row else 0
        name = arrays["names"][begin : int(arrays["name_ends"][row])].tobytes()
        return name.decode("utf-8", "surrogateescape")

    def shard_path(self, shard: int) -> Path:
        """Where a shard of a local folder lies."""
        place = self.shard_place(shard)
        assert isinstance(place, Path), f"{place} lies on no disk of this machine"
        return place

    def shard_place(self, shard: int) -> Path | RemoteFile:
        """Where a shard lies, for messages; a remote one shows its address."""
        return self.parts[self._place(shard)[0]].folder / self.shard_name(shard)

    def sha256(self, shard: int) -> str:
        """The hash of a shard's bytes when it was indexed, in hex."""
        part, row = self._place(shard)
        return self._tables[part].arrays["sha256"][row].tobytes().hex()

    def record(self, position: int) -> tuple[int, int]:
        """Shard number and sample number within it."""
        if not 0 <= position < self.n_samples:
            raise IndexError(f"{self.name} has {self.n_samples} samples; there is no sample {position}")
        shard = int(np.searchsorted(self._sample_ends, position, side="right"))
        return shard, int(position - self._sample_ends[shard] + self.sample_counts[shard])

    def read(self, position: int, *, text: bool = True) -> Sample:
        """Reads one sample; without its captions if not `text`.

        Raises DataError if the shard is gone or has changed since it was indexed, OSError if the disk still
        fails after the retries.
        """
        shard, row = self.record(position)
        return self._patiently(shard, partial(self._read, shard, row, text))

    def _read(self, shard: int, row: int, text: bool) -> Sample:
        fd, columns = self._handle(shard)
        try:
            member = next(scan(fd, int(columns["offset"][row])))
        except (BrokenTar, StopIteration):
            raise self._changed(shard) from None
        name = indexes.sample_name(member.name)
        image = _bytes(fd, int(columns["image_offset"][row]), int(columns["image_size"][row]))
        texts = self._captions(shard, fd, columns, row) if text else []
        return Sample(
            name[0] if name else member.name, self.shard_name(shard), image, texts, int(columns["class"][row])
        )

    def _captions(self, shard: int, fd: int, columns: dict[str, np.ndarray], row: int) -> list[str]:
        """The captions of all fields, laid end to end."""
        found: list[str] = []
        for choice in self._choices_of(self._place(shard)[0]):
            kind, count, at, size = (
                int(columns[indexes.column(name, choice)][row])
                for name in ("text_kind", "captions", "text_offset", "text_size")
            )
            if kind != indexes.NO_TEXT:
                texts = captions.texts(kind, _bytes(fd, at, size), choice)
                if len(texts) != count:
                    raise self._changed(shard)
                found += texts
        return found

    def announce(self, positions: Iterable[int]) -> None:
        """Tells the kernel which images and captions will be read soon."""
        if not hasattr(os, "posix_fadvise"):
            return
        places: dict[int, list[int]] = {}
        for position in positions:
            shard, row = self.record(position)
            places.setdefault(shard, []).append(row)
        self._fetch_ahead([shard for shard in places if shard not in self._open])
        for shard, rows in places.items():
            fd, columns = self._patiently(shard, partial(self._handle, shard))
            ends = [("image_offset", "image_size")]
            for choice in self._choices_of(self._place(shard)[0]):
                ends.append((indexes.column("text_offset", choice), indexes.column("text_size", choice)))
            for row in rows:
                begin = int(columns["offset"][row])
                end = max(int(columns[offset][row] + columns[size][row]) for offset, size in ends)
                os.posix_fadvise(fd, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _fetch_ahead(self, shards: Sequence[int]) -> None:
        """Brings the remote ones of several shards into the cache at once; opening them finds them there."""
        if len(shards) > 1 and any(isinstance(part.folder, RemoteFolder) for part in self.parts):
            _together(FETCHES, self._warm, [shard for shard in shards if self._is_remote(shard)])

    def _warm(self, shard: int) -> None:
        os.close(self._patiently(shard, partial(self._fetch, shard)))

    def check_unchanged(self) -> None:
        """Compares size and mtime of every shard with the index, the hash where they differ.

        Raises DataError naming the first shard that is gone or has changed. A source of more than
        `CHECKED_SHARDS` shards is compared only shard by shard, when each is opened.
        """
        for shard in self.touched():
            self.check(shard)

    def touched(self) -> dict[int, int]:
        """The shards whose size or mtime (a remote one's stamp) is not the index's, each with what it is now.

        Of more than `CHECKED_SHARDS` none is looked at, nor what a command would print. Raises DataError for
        one that is gone, OSError where a server does not answer.
        """
        if len(self) > CHECKED_SHARDS:
            return {}
        remote = [shard for shard in range(len(self)) if self._is_remote(shard)]
        told = dict(zip(remote, _together(TALKS, self._told, remote), strict=True))
        found = {}
        for shard in range(len(self)):
            state = told.get(shard) or self._patiently(shard, partial(self._stat, shard))
            if not self._is_as_indexed(shard, state):
                found[shard] = state.stamp
        return found

    def vouch(self, found: Mapping[int, int]) -> None:
        """Takes shards with these times or stamps for unchanged: somebody has compared their content."""
        self._hashed.update(found.items())

    def check(self, shard: int) -> None:
        """Compares one shard with the index, by its hash where the time differs. DataError if it changed."""
        self._patiently(shard, partial(self._stat_and_compare, shard))

    def close(self) -> None:
        """Closes the files that are open; reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1].fd)

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def _handle(self, shard: int) -> _Open:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if self._is_remote(shard):
            fd = self._fetch(shard)
        else:
            fd = os.open(self.shard_path(shard), os.O_RDONLY)
        try:
            if not self._is_remote(shard):
                self._compare(shard, _local_state(os.fstat(fd)))
            columns = self._columns(shard)
        except BaseException:
            os.close(fd)
            raise
        while len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1].fd)
        self._open[shard] = _Open(fd, columns)
        return self._open[shard]

    def _is_remote(self, shard: int) -> bool:
        return isinstance(self.parts[self._place(shard)[0]].folder, RemoteFolder)

    def _bytes_of(self, shard: int) -> int:
        """The size of a shard when it was indexed."""
        part, row = self._place(shard)
        return int(self._tables[part].arrays["bytes"][row])

    def _fetch(self, shard: int, *, again: bool = False) -> int:
        """A handle on a remote shard's bytes as they were indexed. DataError if they changed."""
        place = self.shard_place(shard)
        assert isinstance(place, RemoteFile)
        assert self.cache is not None
        try:
            return self.cache.shard(place.address, self._bytes_of(shard), self.sha256(shard), again=again)
        except OtherContent as error:
            raise self._changed(shard, str(error)) from None

    def _columns(self, shard: int) -> dict[str, np.ndarray]:
        """The rows of a shard; they must be those of the content that the folder's list names."""
        part = self.parts[self._place(shard)[0]]
        try:
            if part.rows_at is not None:
                return self._fetched_columns(shard, part.rows_at)
            path = indexes.shard_index(part.index, self.shard_name(shard))
            return self._rows_of(shard, read_columns(path), path)
        except (BrokenColumns, FileNotFoundError) as error:
            raise DataError(f"the index is damaged: {error}", self._advice(shard)) from None

    def _fetched_columns(self, shard: int, at: RemoteFolder) -> dict[str, np.ndarray]:
        """The rows of a remote shard; what came damaged is fetched once more."""
        assert self.cache is not None
        place = at / f"{self.shard_name(shard)}.idx"
        key = f"{self.sha256(shard)} {self.parts[self._place(shard)[0]].index}"
        for last in (False, True):
            fd = self.cache.rows(place.address, key)
            try:
                return self._rows_of(shard, read_columns(Path(f"/dev/fd/{fd}")), place)
            except (BrokenColumns, DataError):
                self.cache.drop_rows(place.address, key)
                if last:
                    raise
            finally:
                os.close(fd)
        raise AssertionError("unreachable")

    def _rows_of(self, shard: int, rows: Columns, path: Path | RemoteFile) -> dict[str, np.ndarray]:
        """The columns of a shard, if they are those that the folder's list speaks of, else DataError."""
        if (
            rows.meta.get("format") != indexes.FORMAT
            or rows.meta["sha256"] != self.sha256(shard)
            or not set(self._choices_of(self._place(shard)[0])) <= set(rows.meta["choices"])
        ):
            raise DataError(f"{path} is not what the folder's list says", self._advice(shard))
        return rows.arrays

    @property
    def remote_sizes(self) -> np.ndarray:
        """Bytes of the shards taken that lie elsewhere, (n,) int64."""
        sizes = [
            table.arrays["bytes"] if rows is None else table.arrays["bytes"][rows]
            for part, table, rows in zip(self.parts, self._tables, self._rows, strict=True)
            if isinstance(part.folder, RemoteFolder)
        ]
        return np.concatenate(sizes) if sizes else np.zeros(0, np.int64)

    def check_room(self, size: int) -> None:
        """UserError where a remote shard is larger than a cache of `size` bytes."""
        largest = int(self.remote_sizes.max(initial=0))
        if largest > size:
            raise UserError(
                f"{self.parts[0].folder}: its largest shard has {largest:,} bytes and the cache holds "
                f"{size:,}; set data.cache.size to several times the largest shard"
            )

    def _stat(self, shard: int) -> State:
        return _local_state(os.stat(self.shard_path(shard)))

    def _told(self, shard: int) -> State:
        """What the server says of a remote shard."""
        from clipcluster.data.download import state_of

        place = self.shard_place(shard)
        assert isinstance(place, RemoteFile)
        return self._patiently(shard, partial(state_of, place.address))

    def _stat_and_compare(self, shard: int) -> None:
        if not self._is_remote(shard):
            self._compare(shard, self._stat(shard))
            return
        state = self._told(shard)
        if not self._is_as_indexed(shard, state):
            if state.size not in (None, self._bytes_of(shard)):
                raise self._changed(shard)
            os.close(self._fetch(shard, again=True))  # its hash decides
            self._hashed.add((shard, state.stamp))

    def _is_as_indexed(self, shard: int, state: State) -> bool:
        """By size and time or stamp, as far as both sides know one; one found to be the same will do."""
        part, row = self._place(shard)
        if state.size not in (None, self._bytes_of(shard)):
            return False
        known = int(self._tables[part].arrays["mtime_ns"][row])
        if self._is_remote(shard) and (state.stamp == 0 or known >= 0):
            return True  # whatever is fetched is hashed
        return state.stamp == known or (shard, state.stamp) in self._hashed

    def _compare(self, shard: int, state: State) -> None:
        if self._is_as_indexed(shard, state):
            return
        if state.size != self._bytes_of(shard) or indexes.file_sha256(self.shard_path(shard)) != self.sha256(
            shard
        ):
            raise self._changed(shard)
        self._hashed.add((shard, state.stamp))

    def _changed(self, shard: int, how: str = "") -> DataError:
        told = f" ({how})" if how else ""
        return DataError(
            f"shard {self.shard_place(shard)} changed since it was indexed{told}", self._advice(shard)
        )

    def _advice(self, shard: int) -> str:
        part = self.parts[self._place(shard)[0]]
        return (
            "bring the shard back as it was, or index the folder again and start a new run: "
            f"clipcluster shards index {part.folder}{part.place}"
        )

    def _patiently(self, shard: int, action: Callable[[], T]) -> T:
        """Tries again when the disk fails; a file that stays away is a DataError."""
        for wait in (*RETRIES, None):
            try:
                return action()
            except (Unreachable, Refused):
                raise  # tried often enough
            except OSError as error:
                gone = isinstance(error, FileNotFoundError)
                if wait is None or (gone and self._is_remote(shard)):  # a server means what it says
                    if gone:
                        raise DataError(
                            f"shard {self.shard_place(shard)} is gone", self._advice(shard)
                        ) from None
                    raise OSError(error.errno, f"{error.strerror or error} (tried {len(RETRIES) + 1} times)",
                                  str(self.shard_place(shard))) from error  # fmt: skip
                self._forget(shard)
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _forget(self, shard: int) -> None:
        """Closes a shard's handle, so that the next try opens it anew."""
        if shard in self._open:
            os.close(self._open.pop(shard).fd)


def _name_of(part: Part) -> str:
    """What a source is called after: its folder; a command has none, its index has."""
    if isinstance(part.folder, Path):
        return part.folder.resolve().name
    return part.index.name if part.folder.is_pipe else part.folder.name


def _together(count: int, action: Callable[[int], T], shards: Sequence[int]) -> list[T]:
    """The results of `action`, so many at once; after an error no further one is begun."""
    if not shards:
        return []
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(action, shards))


def _local_state(state: os.stat_result) -> State:
    return State(state.st_size, state.st_mtime_ns)


def _bytes(fd: int, offset: int, size: int) -> bytes:
    """All the bytes asked for; one pread returns 2 GiB at most. OSError if the file ends before."""
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            raise OSError(5, f"the file ends at byte {offset + len(data)}")
        data += more
    return data
