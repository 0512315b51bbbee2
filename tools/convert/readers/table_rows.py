"""Rows of a CSV or TSV file with where each begins, none of them lost to another one's quotes."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from clipcluster.errors import UserError

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Form:
    """How cells are told apart. Without `quotes` a quote is a letter, and a row is a line."""

    separator: str
    quotes: bool = True

    def reader(self, lines: Iterator[str]) -> Any:
        """A csv.reader that refuses what it would have to guess."""
        if self.quotes:
            return csv.reader(lines, delimiter=self.separator, strict=True)
        return csv.reader(lines, delimiter=self.separator, quoting=csv.QUOTE_NONE, strict=True)

    def cells(self, data: bytes) -> list[str]:
        """The cells of one row's bytes, which were found to be good."""
        cells: list[str] = next(self.reader(iter([data.decode()])))
        return cells


class Row(NamedTuple):
    """A row at `offset`, `size` bytes long, `line` counted from 1. `fault`: why it cannot be used."""

    offset: int
    size: int
    line: int
    cells: list[str]
    fault: str = ""


class Table:
    """A file with a header line. UTF-8, with or without a byte order mark."""

    def __init__(self, path: Path, separator: str | None, quotes: bool) -> None:
        """Reads the header; without a separator it is a tab if the header has one, else a comma.

        UserError: no such file, no header, a column named twice, a file in UTF-16.
        """
        self.path = path
        try:
            with open(path, "rb") as file:
                header = file.readline()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if b"\0" in header or header.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{path} is not UTF-8 text (its first line looks like UTF-16 or binary data)")
        self.form = Form(separator or ("\t" if b"\t" in header else ","), quotes)
        self._begin = len(header)
        try:
            self.columns: list[str] = self.form.cells(header.removeprefix(_BOM)) if header.strip() else []
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, line 1: no header line: {error}") from None
        twice = {name for name in self.columns if self.columns.count(name) > 1}
        if not self.columns or twice:
            what = f"the column {min(twice)!r} is named twice" if twice else "the first line names no columns"
            raise UserError(f"{path}: {what}; a table begins with a line of its columns' names")

    def rows(self, names_an_image: Callable[[list[str]], bool]) -> Iterator[Row]:
        """Every row but the header and empty lines, the unusable ones with what is wrong.

        A quote that is never closed, or closed by another row's quote, would take whole rows into one cell.
        So a row that cannot be parsed is given up for its first line alone, and the lines after it are read
        as rows again; and so is one that parses, if a line within its quotes `names_an_image` as a row does.
        """
        with open(self.path, "rb", buffering=1 << 20) as file:
            file.seek(self._begin)
            lines = _Lines(file)
            reader = self.form.reader(lines)
            offset, number = self._begin, 2
            while True:
                cells, fault = self._next(reader, lines, number, names_an_image)
                taken = lines.taken
                if not taken:
                    return
                if fault:
                    lines.give_back(taken[1:])
                    del taken[1:]
                size = sum(map(len, taken))
                if cells or fault:
                    yield Row(offset, size, number, cells, fault)
                offset, number = offset + size, number + len(taken)
                taken.clear()

    def _next(
        self, reader: Any, lines: _Lines, number: int, names_an_image: Callable[[list[str]], bool]
    ) -> tuple[list[str], str]:
        """The cells of the next row, and what is wrong with it."""
        try:
            cells: list[str] = next(reader, [])
        except csv.Error as error:
            reason = "a quote that is never closed, or " if self.form.quotes else ""
            return [], f"{reason}{error}"
        inner = lines.taken[1:]
        for at, line in enumerate(inner, number + 1):
            if line.count(self.form.separator.encode()) == len(self.columns) - 1 and names_an_image(
                line.decode("utf-8", "replace").rstrip("\r\n").split(self.form.separator)
            ):
                return [], f"a quote that is not closed before line {at}, which is a row of its own"
        if lines.not_utf8:
            lines.not_utf8 = False
            return [], "not UTF-8"
        if cells and len(cells) != len(self.columns):
            return [], f"{len(cells)} cells where there are {len(self.columns)} columns"
        return cells, ""


class _Lines:
    """Lines of a file as text. `taken` are those handed out since it was cleared; some may be given back."""

    def __init__(self, file: BinaryIO) -> None:
        self.taken: list[bytes] = []
        self.not_utf8 = False
        self._file = file
        self._back: deque[bytes] = deque()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._back.popleft() if self._back else self._file.readline()
        if not line:
            raise StopIteration
        self.taken.append(line)
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.not_utf8 = True
            return line.decode("utf-8", "replace")

    def give_back(self, lines: list[bytes]) -> None:
        """Lines to hand out again, before the rest of the file."""
        self._back.extendleft(reversed(lines))
        self.not_utf8 = False
