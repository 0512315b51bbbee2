"""Rows of a CSV or TSV file with where each begins, none of them lost to another one's quotes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clipcluster.errors import UserError

_BOM = b"\xef\xbb\xbf"


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

        Without `quotes` a quote is a letter, and a row is a line. UserError: no such file, no header, a
        column named twice, a file in UTF-16.
        """
        self.path = path
        try:
            with open(path, "rb") as file:
                header = file.readline()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if b"\0" in header or header.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{path} is not UTF-8 text (its first line looks like UTF-16 or binary data)")
        self._separator = separator or ("\t" if b"\t" in header else ",")
        self._quotes = quotes
        self._begin = len(header)
        try:
            self.columns: list[str] = self.cells(header.removeprefix(_BOM)) if header.strip() else []
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, line 1: no header line: {error}") from None
        twice = {name for name in self.columns if self.columns.count(name) > 1}
        if not self.columns or twice:
            what = f"the column {min(twice)!r} is named twice" if twice else "the first line names no columns"
            raise UserError(f"{path}: {what}; a table begins with a line of its columns' names")

    def cells(self, data: bytes) -> list[str]:
        """The cells of one row's bytes, which were found to be good."""
        cells: list[str] = next(self._reader([data.decode()]))
        return cells

    def rows(self, names_an_image: Callable[[list[str]], bool]) -> Iterator[Row]:
        """Every row but the header and empty lines, the unusable ones with what is wrong.

        A quote that is never closed, or closed by another row's quote, would take whole rows into one cell.
        So a row that cannot be parsed is given up for its first line alone, and the lines after it are read
        as rows again; and so is one that parses, if a line within its quotes `names_an_image` as a row does.
        """
        taken: list[bytes] = []  # the lines of a row
        with open(self.path, "rb", buffering=1 << 20) as file:

            def lines() -> Iterator[str]:
                for line in file:
                    taken.append(line)
                    yield line.decode("utf-8", "replace")

            offset, number = file.seek(self._begin), 2
            reader = self._reader(lines())
            while True:
                taken.clear()
                cells, fault = self._next(reader, taken, number, names_an_image)
                if not taken:
                    return
                if fault and len(taken) > 1:
                    del taken[1:]
                    file.seek(offset + len(taken[0]))
                    reader = self._reader(lines())
                size = sum(map(len, taken))
                if cells or fault:
                    yield Row(offset, size, number, cells, fault)
                offset, number = offset + size, number + len(taken)

    def _reader(self, lines: Iterable[str]) -> Any:
        """A csv.reader that refuses what it would have to guess."""
        return csv.reader(
            lines,
            delimiter=self._separator,
            quoting=csv.QUOTE_MINIMAL if self._quotes else csv.QUOTE_NONE,
            strict=True,
        )

    def _next(
        self, reader: Any, taken: list[bytes], number: int, names_an_image: Callable[[list[str]], bool]
    ) -> tuple[list[str], str]:
        """The cells of the next row, whose lines are `taken`, and what is wrong with it."""
        try:
            cells: list[str] = next(reader, [])
        except csv.Error as error:
            reason = "a quote that is never closed, or " if self._quotes else ""
            return [], f"{reason}{error}"
        for at, line in enumerate(taken[1:], number + 1):
            inner = line.decode("utf-8", "replace").rstrip("\r\n").split(self._separator)
            if len(inner) == len(self.columns) and names_an_image(inner):
                return [], f"a quote that is not closed before line {at}, which is a row of its own"
        try:
            b"".join(taken).decode()
        except UnicodeDecodeError:
            return [], "not UTF-8"
        if cells and len(cells) != len(self.columns):
            return [], f"{len(cells)} cells where there are {len(self.columns)} columns"
        return cells, ""
