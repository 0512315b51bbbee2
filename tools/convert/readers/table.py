"""Tables of image paths and captions, CSV or TSV: a row a pair, as OpenCLIP reads them.

Rows that name the same image are one sample, wherever they stand; its captions go in their order. What pandas
takes for a gap (`NA`, `None`, `null`) is text; an empty cell is no caption.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.errors import UserError
from clipcluster.text import counted
from tools.convert.readers.open_file import OpenFile
from tools.convert.readers.table_rows import Table
from tools.convert.records import BadRecord, InputFile, Kind, Record, Source, Split, option

# The usual names of the columns that tables of images and captions have, most telling first.
IMAGE_PATHS = ("image_path", "filepath", "file_path", "path", "image", "file_name", "filename")
CAPTIONS = ("captions", "caption", "text", "txt", "TEXT", "title", "sentences")

_NAMED = re.compile(r"([A-Za-z0-9][\w-]*)=(.+)", re.DOTALL)
_SEPARATORS = {"tab": "\t", r"\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
_NO_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
_OPEN_TABLES = 64  # at most, in each process
_WATCHED = 1_000_000  # images of a split whose times are asked for, to notice a changed one
_TRIED = 100  # images, to see whether the paths lead anywhere


@dataclass(frozen=True)
class Options:
    """What can be chosen about tables."""

    image_column: str = option(
        "filepath", "The column with the images' paths. Without that one: image_path, path, …", metavar="NAME"
    )
    caption_column: str = option(
        "title", "The column with the captions. Without that one: caption, text, …", metavar="NAME"
    )
    class_column: str | None = option(None, "The column with the images' class numbers.", metavar="NAME")
    separator: str | None = option(
        None,
        "A character, or tab, comma, …; else a tab if the first line has one, else a comma.",
        metavar="CHAR",
    )
    quotes: bool = option(True, 'Cells may stand in quotes, "" for a quote in them; else quotes are letters.')
    root: Path | None = option(None, "What paths are relative to; else the table's folder.", metavar="DIR")


class Images:
    """The images that tables name, in the order in which they are first named, and the rows of each.

    Rows are kept as their places in the files. A row that cannot be used is an image of its own, and a sample
    that cannot be used.
    """

    def __init__(self, name: str, tables: Sequence[Table], options: Options) -> None:
        self.name = name
        self._faults: dict[int, str] = {}  # by row
        self._tables = tables
        self._options = options
        self._roots = [os.path.abspath(options.root or table.path.parent) for table in tables]
        self._opened = lru_cache(_OPEN_TABLES)(lambda table: OpenFile(tables[table].path))
        self._rows, digests = self._scan()
        self._order, self._ends = grouped(digests)

    def __len__(self) -> int:
        return len(self._ends)

    def split(self) -> Split:
        """The images as samples."""
        return Split(self.name, len(self), self._sizes, self._read, account=self._account)

    def states(self) -> Iterator[tuple[str, int, int]]:
        """Path, bytes and time of every image; 0 where there is none."""
        for number in range(len(self)):
            path = self.path(number) or ""
            yield path, *file_state(path)

    def path(self, number: int) -> str | None:
        """Where an image lies; None for a row that cannot be used."""
        row = self._rows_of(number)[0]
        return None if row in self._faults else self._path(row, self._cells(row))

    def notes(self) -> Iterator[str]:
        """What cannot be used."""
        if self._faults:
            name = f"{self.name}: " if self.name else ""
            row, fault = min(self._faults.items())
            quotes = "; where quotes are letters, give --no-quotes" if "quote" in fault else ""
            first = f"{self._where(row)}: {fault}"
            yield f"{name}{counted(len(self._faults), 'row')} cannot be used; the first: {first}{quotes}"

    def _scan(self) -> tuple[np.ndarray, np.ndarray]:
        """All rows: table, line, offset and size, (n, 4); and 16 bytes (n,) that tell their images apart."""
        rows, digests = array("q"), bytearray()
        for number, table in enumerate(self._tables):
            image = table.columns.index(self._options.image_column)
            before, digest = "", b""
            for row in table.rows(partial(self._names_an_image, number, image)):
                cell = "" if row.fault else row.cells[image]
                fault = row.fault or ("names no image" if not cell or "\0" in cell else "")
                if fault:
                    self._faults[len(rows) // 4] = fault
                    cell = f"\0{len(rows)}"  # one that no image has
                if cell != before:
                    path = cell if fault else self._absolute(number, cell)
                    before, digest = cell, hashlib.blake2b(os.fsencode(path), digest_size=16).digest()
                digests += digest
                rows.extend((number, row.line, row.offset, row.size))
        return np.array(rows, np.int64).reshape(-1, 4), np.frombuffer(digests, "S16")

    def _names_an_image(self, table: int, column: int, cells: Sequence[str]) -> bool:
        name = cells[column].strip('"')
        return bool(name) and os.path.isfile(self._absolute(table, name))

    def _absolute(self, table: int, cell: str) -> str:
        return os.path.normpath(os.path.join(self._roots[table], cell))

    def _rows_of(self, number: int) -> list[int]:
        """The numbers of an image's rows."""
        start = self._ends[number - 1] if number else 0
        rows: list[int] = self._order[start : self._ends[number]].tolist()
        return rows

    def _cells(self, row: int) -> dict[str, str]:
        """The cells of a row by column."""
        table, _, offset, size = self._rows[row].tolist()
        data = self._opened(table).read(offset, size)
        return dict(zip(self._tables[table].columns, self._tables[table].cells(data), strict=True))

    def _path(self, row: int, cells: Mapping[str, str]) -> str:
        return self._absolute(int(self._rows[row, 0]), cells[self._options.image_column])

    def _where(self, row: int) -> str:
        """A row's table and line."""
        table, line, _, _ = self._rows[row].tolist()
        return f"{self._tables[table].path.name}, line {line}"

    def _sizes(self) -> np.ndarray:
        return np.fromiter((size for _, size, _ in self.states()), np.int64, len(self))

    def _read(self, number: int) -> Record:
        rows, key = self._rows_of(number), f"{number:09d}"
        where = self._where(rows[0])
        if rows[0] in self._faults:
            raise BadRecord(key, f"{where}: {self._faults[rows[0]]}")
        cells = [self._cells(row) for row in rows]
        path = self._path(rows[0], cells[0])
        image = image_file(path, key, f"{where}: ")
        captions = [row[self._options.caption_column] for row in cells]
        cls = self._class(key, rows, cells)
        return Record(key, image, [text for text in captions if text.strip()], self._fields(cells), cls)

    def _fields(self, cells: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """The other columns: an image's one value, or where its rows differ the values of all rows."""
        fields: dict[str, Any] = {}
        for column in {name: None for row in cells for name in row}:
            values = [row.get(column, "") for row in cells]
            if column not in (self._options.caption_column, self._options.class_column):
                fields[column] = values[0] if len({*values}) == 1 else values
        return fields

    def _class(self, key: str, rows: Sequence[int], cells: Sequence[Mapping[str, str]]) -> int | None:
        column = self._options.class_column
        if column is None:
            return None
        values = {row.get(column, "").strip(): where for row, where in zip(cells, rows, strict=True)}
        values.pop("", None)
        for value, row in values.items():
            if not (value.isascii() and value.isdigit()):
                raise BadRecord(key, f"{self._where(row)}: {column} {value!r} is not a class number")
        if len({int(value) for value in values}) > 1:
            raise BadRecord(key, f"{self._where(rows[0])}: of several classes: {', '.join(values)}")
        return next(map(int, values), None)

    def _account(self, left_out: Sequence[int], captions: int) -> list[tuple[str, int]]:
        """Where the rows and the images went: each first line is the sum of the indented ones below it."""
        lost = [rows for rows in map(self._rows_of, left_out) if rows[0] not in self._faults]
        rows_lost, unusable = sum(map(len, lost)), len(self._faults)
        rows, images = len(self._rows), len(self) - unusable
        return [
            ("rows", rows),
            ("  not usable", unusable),
            ("  of images left out", rows_lost),
            ("  with an empty caption", rows - unusable - rows_lost - captions),
            ("  captions written", captions),
            ("images", images),
            ("  left out (no file, no image)", len(lost)),
            ("  written", images - len(lost)),
        ]


def file_state(path: str | Path) -> tuple[int, int]:
    """Bytes and time (ns) of a file; zeros where there is none."""
    state = os.stat(path) if os.path.isfile(path) else None
    return (state.st_size, state.st_mtime_ns) if state else (0, 0)


def image_file(path: str | Path, key: str, where: str = "") -> bytes:
    """The bytes of the image of a row. BadRecord: there is no such file; OSError where the disk fails."""
    try:
        return Path(path).read_bytes()
    except ValueError as error:  # a null byte
        raise BadRecord(key, f"{where}{path}: {error}") from None
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise BadRecord(key, f"{where}{path}: {error.strerror}") from None


def grouped(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows by their name (n,), groups by their first row, (n,); where each group ends, (groups,)."""
    _, first, group = np.unique(names, return_index=True, return_inverse=True)
    firsts = first[group]
    order = np.argsort(firsts, kind="stable")
    return order, np.flatnonzero(np.diff(firsts[order], append=-1)) + 1


def open_tables(inputs: Sequence[Path], options: Options) -> Source:
    """A split for every NAME, or one without. UserError: no table, no such column, paths to nowhere."""
    separator = options.separator and _SEPARATORS.get(options.separator, options.separator)
    if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
        raise UserError(f"--separator {separator!r}: give one character, or {', '.join(_SEPARATORS)}")
    if options.root is not None and not options.root.is_dir():
        raise UserError(f"--root {options.root}: no such folder")
    tables: dict[str, list[Table]] = {}
    for name, path in _named(inputs):
        if path.is_dir():
            raise UserError(f"{path} is a folder; convert csv takes the tables in it: {path}/*.csv")
        tables.setdefault(name, []).append(Table(path, separator, options.quotes))
    every = [table for of_split in tables.values() for table in of_split]
    options = _with_usual_columns(every[0], options)
    for table in every:
        _check_columns(table, options)
    splits = [Images(name, of_split, options) for name, of_split in tables.items()]
    for split in splits:
        _check_paths(split, options)
    files = [InputFile.of(table.path) for table in every]
    files += [
        InputFile.of_many(f"images of {split.name or 'the table'}", split.states())
        for split in splits
        if len(split) <= _WATCHED
    ]
    notes = [note for split in splits for note in split.notes()]
    return Source([split.split() for split in splits], files, notes)


def _named(inputs: Sequence[Path]) -> list[tuple[str, Path]]:
    """Split and file of every input; FILE, or NAME=FILE."""
    found = []
    for path in inputs:
        match = None if path.exists() else _NAMED.fullmatch(str(path))
        found.append((match[1], Path(match[2])) if match else ("", path))
    if not found or (len({bool(name) for name, _ in found}) > 1):
        raise UserError(
            "convert csv takes FILE …, shards in --out itself, or NAME=FILE …, shards in folders of "
            "that name (train=train.tsv val=val.tsv); not both"
        )
    return found


def _with_usual_columns(table: Table, options: Options) -> Options:
    """The options with a usual column of `table` in place of a default one that it does not have."""
    default, image, caption = Options(), options.image_column, options.caption_column
    if image == default.image_column:
        image = next((name for name in (image, *IMAGE_PATHS) if name in table.columns), image)
    if caption == default.caption_column:
        others = [name for name in table.columns if name != image]
        caption = next((name for name in (caption, *CAPTIONS) if name in others), caption)
    return replace(options, image_column=image, caption_column=caption)


def _check_columns(table: Table, options: Options) -> None:
    """UserError that names all missing columns, with the option for each."""
    chosen = {
        "--image-column": options.image_column,
        "--caption-column": options.caption_column,
        "--class-column": options.class_column,
    }
    missing = {option: column for option, column in chosen.items() if column and column not in table.columns}
    if missing:
        raise UserError(
            f"{table.path} has no column {' or '.join(map(repr, missing.values()))}, but: "
            f"{', '.join(map(repr, table.columns))}; name the columns with "
            f"{' and '.join(f'{option} NAME' for option in missing)}, or how cells are told apart with "
            "--separator"
        )
    if "captions" in table.columns and options.caption_column != "captions":
        raise UserError(
            f"{table.path}: the column 'captions' would take the place of a sample's captions; give "
            "--caption-column captions if it is them, or rename it"
        )


def _check_paths(split: Images, options: Options) -> None:
    """UserError if none of the first images is there: every path is relative to something else, then."""
    paths = list(islice(filter(None, map(split.path, range(len(split)))), _TRIED))
    if not paths or any(map(os.path.isfile, paths)):
        return
    raise UserError(
        f"none of the first {len(paths)} images is there, such as {paths[0]}; paths are relative to "
        f"{options.root or 'the folder of their table'}: say what they are relative to with --root DIR "
        "(--root . is where this command runs, as OpenCLIP reads them)"
    )


KIND = Kind(
    "CSV or TSV tables with a row for each pair of an image's path and a caption.",
    open_tables,
    "FILE …: all in one folder of shards; or NAME=FILE …: one for each NAME",
    Options,
)
