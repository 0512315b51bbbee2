"""Parquet files with an image a row: its bytes (img2dataset's, Hugging Face's), or the path of its file."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.errors import UserError
from tools.convert.readers.table import CAPTIONS, IMAGE_PATHS, file_state, image_file
from tools.convert.records import BadRecord, InputFile, Kind, Record, Source, Split, option

CACHED_GROUPS = 4  # row groups that a process keeps, if they are not too large together
CACHED_BYTES = 256 << 20

_CLASSES = ("cls", "label")
_FAILURE = ("status", "error_message")  # img2dataset says here why a row has no image
_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")


@dataclass(frozen=True)
class Options:
    """The options of `convert parquet`."""

    image_column: str | None = option(
        None,
        "The column of the images, bytes or paths. Default: the one of bytes, else of a usual name.",
        metavar="NAME",
    )
    caption_column: tuple[str, ...] = option(
        (), "A column of captions; may be repeated. Default: captions, caption, text, …", metavar="NAME"
    )
    class_column: str | None = option(
        None, "The column of class numbers. Default: cls or label, if of integers.", metavar="NAME"
    )
    key_column: str | None = option(None, "The column of keys. Default: the row's number.", metavar="NAME")
    json_column: tuple[str, ...] = option(
        (), "A column for the json; may be repeated, - for none. Default: all others.", metavar="NAME"
    )
    root: Path | None = option(None, "What paths are relative to; else the file's folder.", metavar="DIR")


@dataclass(frozen=True)
class Columns:
    """What each column of the files is for. `image_kind` is bytes, struct (with bytes) or text (a path)."""

    image: str
    image_kind: str
    captions: tuple[str, ...]
    cls: str | None
    key: str | None
    fields: tuple[str, ...]
    failure: tuple[str, ...]

    @property
    def read(self) -> list[str]:
        """All columns that a sample needs, each once."""
        wanted = [self.image, *self.captions, self.cls, self.key, *self.fields, *self.failure]
        return list(dict.fromkeys(name for name in wanted if name))


class Rows:
    """The rows of some files; row groups are read whole, and the last few are kept."""

    def __init__(self, paths: Sequence[Path], columns: Columns, root: Path | None) -> None:
        self._paths, self._columns, self._root = paths, columns, root
        groups = []  # file, number within it, rows, bytes of the images
        largest = 1
        for number, path in enumerate(paths):
            metadata = _parquet().ParquetFile(path).metadata
            for within in range(metadata.num_row_groups):
                group = metadata.row_group(within)
                groups.append((number, within, group.num_rows, _column_bytes(group, columns.image)))
                largest = max(largest, group.total_byte_size)
        self._groups = np.array(groups, np.int64).reshape(-1, 4)
        self._ends = np.cumsum(self._groups[:, 2])
        self._keys = None if columns.key is None else self._all_keys(columns.key)
        # processes cannot share a handle, so each opens its own
        self._opened = lru_cache(1)(lambda file, process: _parquet().ParquetFile(paths[file]))
        self._table = lru_cache(max(1, min(CACHED_GROUPS, CACHED_BYTES // largest)))(self._read_group)

    def __len__(self) -> int:
        return int(self._groups[:, 2].sum())

    def sizes(self) -> np.ndarray:
        """Of images behind paths what their files have; of bytes the mean of their row group."""
        if self._columns.image_kind != "text":
            return np.repeat(self._groups[:, 3] // np.maximum(self._groups[:, 2], 1), self._groups[:, 2])
        sizes = [
            file_state(self._place(number, value))[0] if value else 0
            for number, path in enumerate(self._paths)
            for value in column_of(path, self._columns.image)
        ]
        return np.array(sizes, np.int64)

    def read(self, number: int) -> Record:
        """One row as a sample. BadRecord: no image; OSError where the disk fails."""
        group = int(np.searchsorted(self._ends, number, side="right"))
        at = number - int(self._ends[group] - self._groups[group, 2])
        row = {name: column[at].as_py() for name, column in self._table(group).items()}
        key = f"{number:09d}" if self._keys is None else self._keys[number]
        columns = self._columns
        texts = [text for name in columns.captions for text in _texts(row[name])]
        cls = row[columns.cls] if columns.cls else None
        fields = {name: _plain(row[name]) for name in columns.fields}
        image = self._image(key, int(self._groups[group, 0]), row)
        return Record(key, image, texts, fields, cls if cls is not None and cls >= 0 else None)

    def _image(self, key: str, file: int, row: dict[str, Any]) -> bytes:
        value = row[self._columns.image]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            failure = ", ".join(str(row[name]) for name in self._columns.failure if row[name])
            raise BadRecord(key, "no image in its row" + (f": {failure}" if failure else ""))
        return value if isinstance(value, bytes) else image_file(self._place(file, value), key)

    def _place(self, file: int, value: str) -> Path:
        return (self._root or self._paths[file].parent) / value

    def _all_keys(self, name: str) -> list[str]:
        """The key column, fit for members' names. UserError if two are the same."""
        keys = [_key(value) for path in self._paths for value in column_of(path, name)]
        seen: dict[str, int] = {}
        for number, key in enumerate(keys):
            if not key.rpartition("/")[2] or seen.setdefault(key, number) != number:
                problem = f"is also that of row {seen[key]}" if key in seen else "is empty"
                raise UserError(
                    f"column {name!r}: the key {key!r} of row {number} {problem}; keys are unique: "
                    "name another column with --key-column, or none for the rows' numbers"
                )
        return keys

    def _read_group(self, group: int) -> dict[str, Any]:
        """The columns of a row group."""
        file, within, _, _ = self._groups[group].tolist()
        opened = self._opened(file, os.getpid())
        read = opened.read_row_group(within, columns=self._columns.read, use_threads=False)
        return {name: read.column(name) for name in read.column_names}


def open_rows(inputs: Sequence[Path], options: Options) -> Source:
    """Opens parquet files, or folders of them. Files named SPLIT-00000-of-00001.parquet of several splits, as
    on the Hugging Face hub, become as many splits.

    UserError: no such file, no parquet, columns that are not there, two keys that are the same.
    """
    paths = [path for given in inputs for path in _find(given)]
    schemas = {path: _schema(path) for path in paths}
    columns = _choose(schemas[paths[0]], options, paths[0])
    for path, schema in schemas.items():
        missing = [name for name in columns.read if name not in schema.names]
        if missing or _kind(schema.field(columns.image).type) != columns.image_kind:
            what = f"no column {missing[0]!r}" if missing else f"column {columns.image!r} has another type"
            raise UserError(
                f"{path}: {what}, unlike {paths[0]}; convert files of different columns on their own"
            )
    names = _class_names(schemas[paths[0]], columns.cls)
    files = {"classnames.txt": "".join(f"{name}\n" for name in names)} if names else {}
    parts = {name: Rows(part, columns, options.root) for name, part in _splits(paths).items()}
    splits = [
        Split(name, len(rows), rows.sizes, rows.read, files) for name, rows in parts.items() if len(rows)
    ]
    notes = [] if columns.captions else [f"no column of captions among {', '.join(schemas[paths[0]].names)}"]
    kept = set(columns.read)
    left = [name for name in schemas[paths[0]].names if name not in kept]
    notes += [f"columns that are not taken: {', '.join(left)}"] if left else []
    if not splits:
        raise UserError(f"{', '.join(map(str, inputs))}: the files hold no row")
    return Source(splits, [InputFile.of(path) for path in paths], notes)


def column_of(path: Path, name: str) -> list[Any]:
    """A whole column of a file, read without threads: workers are forked later."""
    return _parquet().ParquetFile(path).read([name], use_threads=False).column(0).to_pylist()


def _find(given: Path) -> list[Path]:
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise UserError(f"{given}: no such file or folder; give parquet files, or folders of them")
    found = sorted(path for path in given.rglob("*.parquet") if path.is_file())
    if not found:
        raise UserError(f"{given}: no .parquet in this folder or below it")
    return found


def _splits(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the split that their names tell, if all tell one and there are several."""
    matches = [_SPLIT.fullmatch(path.stem) for path in paths]
    splits: dict[str, list[Path]] = {}
    for path, match in zip(paths, matches, strict=True):
        splits.setdefault(match.group(1) if match else "", []).append(path)
    return splits if all(matches) and len(splits) > 1 else {"": list(paths)}


def _schema(path: Path) -> Any:
    parquet = _parquet()
    import pyarrow

    try:
        return parquet.read_schema(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None


def _choose(schema: Any, options: Options, path: Path) -> Columns:
    """The columns asked for, or found by type and name."""
    kinds = {name: _kind(schema.field(name).type) for name in schema.names}
    asked = filter(None, (options.image_column, options.class_column, options.key_column))
    for name in (*asked, *options.caption_column, *(one for one in options.json_column if one != "-")):
        if name not in kinds:
            raise UserError(f"{path}: no column {name!r}; its columns are {', '.join(kinds)}")
    image = options.image_column or _image_column(kinds, path)
    if kinds[image] not in ("bytes", "struct", "text"):
        raise UserError(f"{path}: column {image!r} holds {schema.field(image).type}, neither bytes nor paths")
    usual = [name for name in CAPTIONS if kinds.get(name) in ("text", "texts") and name != image]
    captions = options.caption_column or tuple(usual[:1])
    cls = options.class_column or next((name for name in _CLASSES if kinds.get(name) == "integer"), None)
    if cls and kinds[cls] != "integer":
        raise UserError(f"{path}: column {cls!r} holds {schema.field(cls).type}; a class is an integer")
    used = {image, cls, *captions, "captions"}
    others = [name for name, kind in kinds.items() if name not in used and kind not in ("bytes", "struct")]
    fields = tuple(name for name in options.json_column or others if name != "-")
    failure = tuple(name for name in _FAILURE if name in kinds)
    return Columns(image, kinds[image], captions, cls, options.key_column or None, fields, failure)


def _image_column(kinds: Mapping[str, str], path: Path) -> str:
    binary = [name for name, kind in kinds.items() if kind in ("bytes", "struct")]
    found = binary or [name for name in IMAGE_PATHS if kinds.get(name) == "text"][:1]
    if len(found) == 1:
        return found[0]
    what = (
        f"several columns of bytes ({', '.join(binary)})" if binary else "no column of image bytes or paths"
    )
    raise UserError(f"{path}: {what}; name it with --image-column; its columns are {', '.join(kinds)}")


def _kind(kind: Any) -> str:
    """What a column of this type holds: bytes, struct (with bytes), text, texts (a list), integer, other."""
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind):
        return "bytes"
    if types.is_struct(kind):
        inner = kind.get_field_index("bytes")
        return "struct" if inner >= 0 and _kind(kind.field(inner).type) == "bytes" else "other"
    if types.is_list(kind) or types.is_large_list(kind):
        return "texts" if _kind(kind.value_type) in ("text", "texts") else "other"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    return "integer" if types.is_integer(kind) else "other"


def _class_names(schema: Any, cls: str | None) -> list[str]:
    """The names that Hugging Face's metadata gives the numbers of the class column."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[cls]["names"]
    except (TypeError, LookupError, ValueError):
        return []
    return [" ".join(str(name).split()) for name in names]


def _column_bytes(group: Any, column: str) -> int:
    """Uncompressed bytes of a column, those of a struct's parts together."""
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]


def _key(value: Any) -> str:
    """A key without a dot in its last part, which would end it, and without a slash at an end."""
    folder, slash, name = str("" if value is None else value).strip("/").rpartition("/")
    return folder + slash + name.replace(".", "_")


def _plain(value: Any) -> Any:
    """A value that JSON can say: NaN becomes null, times ISO text, bytes hex."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet files are read with pyarrow: pip install 'clipcluster[parquet]'") from None
    return parquet


KIND = Kind(
    "Parquet files with a column of image bytes (img2dataset's, Hugging Face's) or of image paths.",
    open_rows,
    inputs="Parquet files, or folders of them.",
    options=Options,
)
