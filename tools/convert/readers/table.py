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
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.errors import UserError
from tools.convert.readers.byte_ranges import ByteRanges
from tools.convert.readers.column_names import CAPTIONS, IMAGE_PATHS, first_of
from tools.convert.readers.table_rows import Row, Table
from tools.convert.records import BadRecord, InputFile, Kind, Record, Source, option

_NAMED = re.compile(r"([A-Za-z0-9][\w-]*)=(.+)", re.DOTALL)
_SEPARATORS = {"tab": "\t", r"\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
_NO_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
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


class _Images:
    """The images that tables name, in the order in which they are first named, and the rows of each.

    Rows are kept as their places in the files. A row that cannot be used is an image of its own.
    """

    def __init__(self, tables: Sequence[Table], options: Options) -> None:
        self.faults: dict[int, str] = {}
        self._tables = tables
        self._options = options
        self._roots = [os.path.abspath(options.root or table.path.parent) for table in tables]
        self._files = [ByteRanges(table.path) for table in tables]
        self._table, self._line = array("i"), array("q")
        self._offset, self._size = array("q"), array("q")
        self._order, self._ends = _grouped(np.array(self._scan(), np.uint64).reshape(-1, 2))

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def row_count(self) -> int:
        return len(self._table)

    def rows(self, number: int) -> list[int]:
        """The numbers of an image's rows."""
        start = self._ends[number - 1] if number else 0
        return [int(row) for row in self._order[start : self._ends[number]]]

    def cells(self, row: int) -> dict[str, str]:
        """The cells of a row by column."""
        table = self._table[row]
        data = self._files[table].read(self._offset[row], self._size[row])
        return dict(zip(self._tables[table].columns, self._tables[table].form.cells(data), strict=True))

    def path(self, row: int, cells: Mapping[str, str]) -> str:
        """Where the image of a row lies."""
        return self._path(self._table[row], cells[self._options.image_column])

    def where(self, row: int) -> str:
        """A row's table and line."""
        return f"{self._tables[self._table[row]].path.name}, line {self._line[row]}"

    def _scan(self) -> array[int]:
        """Finds all rows; two numbers a row, the same for the same image."""
        digests = array("Q")
        before, digest = "", b""
        for table in range(len(self._tables)):
            for row, path in self._rows_of(table):
                if row.fault:
                    self.faults[self.row_count] = row.fault
                    path = f"\0{self.row_count}"  # one that no image has
                if path != before:
                    before, digest = path, hashlib.blake2b(os.fsencode(path), digest_size=16).digest()
                digests.frombytes(digest)
                self._table.append(table)
                self._line.append(row.line)
                self._offset.append(row.offset)
                self._size.append(row.size)
        return digests

    def _rows_of(self, table: int) -> Iterator[tuple[Row, str]]:
        """The rows of a table, and the image each names."""
        image = self._tables[table].columns.index(self._options.image_column)
        cell = path = ""

        def names_an_image(cells: Sequence[str]) -> bool:
            name = cells[image].strip('"')
            return bool(name) and os.path.isfile(self._path(table, name))

        for row in self._tables[table].rows(names_an_image):
            if row.fault:
                yield row, ""
            elif not row.cells[image] or "\0" in row.cells[image]:
                yield row._replace(fault="names no image"), ""
            else:
                if row.cells[image] != cell:
                    cell = row.cells[image]
                    path = self._path(table, cell)
                yield row, path

    def _path(self, table: int, cell: str) -> str:
        return os.path.normpath(os.path.join(self._roots[table], cell))


def _grouped(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows by group, groups by their first row, (n,); where each group ends, (groups,). `digests` (n, 2)."""
    order = np.lexsort((np.arange(len(digests)), digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    first = np.ones(len(order), bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    starts = np.flatnonzero(first)
    counts = np.diff(np.append(starts, len(order)))
    firsts = np.repeat(order[starts], counts)  # rows within a group are in order already
    by_first = np.argsort(firsts, kind="stable")
    return order[by_first], np.cumsum(counts[np.argsort(order[starts], kind="stable")])


class TableSplit:
    """The images that one or more tables name; a row that cannot be used is a sample that cannot be used."""

    def __init__(self, name: str, tables: Sequence[Table], options: Options) -> None:
        self.name = name
        self.files: Mapping[str, str] = {}
        self.images = _Images(tables, options)
        self._options = options

    def __len__(self) -> int:
        return len(self.images)

    def sizes(self) -> np.ndarray:
        return np.fromiter((size for _, size, _ in self.states()), np.int64, len(self))

    def states(self) -> Iterator[tuple[str, int, int]]:
        """Path, bytes and time of every image; 0 where there is none."""
        for number in range(len(self)):
            path = self.path(number)
            state = os.stat(path) if path is not None and os.path.isfile(path) else None
            yield (path or "", state.st_size, state.st_mtime_ns) if state else (path or "", 0, 0)

    def path(self, number: int) -> str | None:
        """Where the image of a sample lies; None for a row that cannot be used."""
        row = self.images.rows(number)[0]
        return None if row in self.images.faults else self.images.path(row, self.images.cells(row))

    def read(self, number: int) -> Record:
        rows, key = self.images.rows(number), f"{number:09d}"
        where = self.images.where(rows[0])
        if rows[0] in self.images.faults:
            raise BadRecord(key, f"{where}: {self.images.faults[rows[0]]}")
        cells = [self.images.cells(row) for row in rows]
        path = self.images.path(rows[0], cells[0])
        try:
            image = Path(path).read_bytes()
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            raise BadRecord(key, f"{where}: {path}: {error.strerror}") from None
        captions = [row[self._options.caption_column] for row in cells]
        cls = self._class(key, rows, cells)
        return Record(key, image, [text for text in captions if text.strip()], self._fields(cells), cls)

    def notes(self) -> Iterator[str]:
        """What cannot be used."""
        faults = self.images.faults
        if faults:
            name = f"{self.name}: " if self.name else ""
            row = min(faults)
            first = f"{self.images.where(row)}: {faults[row]}"
            quotes = "; where quotes are letters, give --no-quotes" if "quote" in faults[row] else ""
            yield f"{name}{len(faults):,} rows cannot be used; the first: {first}{quotes}"

    def account(self, left_out: Sequence[int], captions: int) -> list[tuple[str, int]]:
        """Where the rows and the images went: each first line is the sum of the indented ones below it."""
        faults = self.images.faults
        lost = [number for number in left_out if self.images.rows(number)[0] not in faults]
        rows_lost = sum(len(self.images.rows(number)) for number in lost)
        rows, images = self.images.row_count, len(self) - len(faults)
        return [
            ("rows", rows),
            ("  not usable", len(faults)),
            ("  of images left out", rows_lost),
            ("  with an empty caption", rows - len(faults) - rows_lost - captions),
            ("  captions written", captions),
            ("images", images),
            ("  left out (no file, no image)", len(lost)),
            ("  written", images - len(lost)),
        ]

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
                raise BadRecord(key, f"{self.images.where(row)}: {column} {value!r} is not a class number")
        if len({int(value) for value in values}) > 1:
            raise BadRecord(key, f"{self.images.where(rows[0])}: of several classes: {', '.join(values)}")
        return next(map(int, values), None)


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
    splits = [TableSplit(name, of_split, options) for name, of_split in tables.items()]
    for split in splits:
        _check_paths(split, options)
    files = [InputFile.of(table.path) for table in every]
    files += [
        InputFile.of_many(f"images of {split.name or 'the table'}", split.states())
        for split in splits
        if len(split) <= _WATCHED
    ]
    return Source(splits, files, [note for split in splits for note in split.notes()])


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
    columns, default = table.columns, Options()
    image, caption = options.image_column, options.caption_column
    if image == default.image_column and image not in columns:
        image = first_of(IMAGE_PATHS, columns) or image
    if caption == default.caption_column and caption not in columns:
        caption = first_of(CAPTIONS, [name for name in columns if name != image]) or caption
    return replace(options, image_column=image, caption_column=caption)


def _check_columns(table: Table, options: Options) -> None:
    """UserError that names all missing columns, with the option for each."""
    chosen = (
        ("--image-column", options.image_column),
        ("--caption-column", options.caption_column),
        ("--class-column", options.class_column),
    )
    missing = [
        (option_name, column) for option_name, column in chosen if column and column not in table.columns
    ]
    if missing:
        raise UserError(
            f"{table.path} has no column {' or '.join(repr(column) for _, column in missing)}, but: "
            f"{', '.join(map(repr, table.columns))}; name the columns with "
            f"{' and '.join(f'{option_name} NAME' for option_name, _ in missing)}, or how cells are told "
            "apart with --separator"
        )
    if "captions" in table.columns and options.caption_column != "captions":
        raise UserError(
            f"{table.path}: the column 'captions' would take the place of a sample's captions; give "
            "--caption-column captions if it is them, or rename it"
        )


def _check_paths(split: TableSplit, options: Options) -> None:
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
