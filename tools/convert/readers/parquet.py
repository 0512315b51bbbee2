"""Parquet files with an image a row: its bytes (img2dataset's, Hugging Face's), or the path of its file."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.errors import UserError
from tools.convert.readers.column_names import CAPTIONS, IMAGE_PATHS
from tools.convert.records import BadRecord, InputFile, Kind, Record, Source, option

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
    """What each column of the files is for. `image_kind` is bytes, struct (of bytes and path) or path."""

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
    """The rows of some files as one split; row groups are read whole, and the last few are kept."""

    def __init__(
        self, name: str, paths: Sequence[Path], columns: Columns, root: Path | None, files: Mapping[str, str]
    ) -> None:
        self.name, self.files = name, files
        self._paths, self._columns, self._root = list(paths), columns, root
        counts, sizes = [], []
        for number, path in enumerate(self._paths):
            metadata = _parquet().ParquetFile(path).metadata
            for group in range(metadata.num_row_groups):
                counts.append((number, group, metadata.row_group(group).num_rows))
                sizes.append(_column_bytes(metadata.row_group(group), columns.image))
        self._groups = np.array(counts, np.int64).reshape(-1, 3)
        self._group_bytes = np.array(sizes, np.int64)
        self._ends = np.cumsum(self._groups[:, 2])
        self._keys = None if columns.key is None else self._all_keys(columns.key)
        self._files: dict[int, Any] = {}
        self._tables: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_tables": OrderedDict()}

    def sizes(self) -> np.ndarray:
        """Of images behind paths what their files have; of bytes the mean of their row group."""
        rows = self._groups[:, 2]
        if self._columns.image_kind != "path":
            return np.repeat(self._group_bytes // np.maximum(rows, 1), rows)
        sizes = []
        for number, path in enumerate(self._paths):
            for value in column_of(path, self._columns.image):
                place = self._place(number, value) if value else None
                sizes.append(place.stat().st_size if place is not None and place.is_file() else 0)
        return np.array(sizes, np.int64)

    def read(self, number: int) -> Record:
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} rows; there is no row {number}")
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
        if isinstance(value, bytes):
            return value
        path = self._place(file, value)
        try:
            return path.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise BadRecord(key, f"{path}: no such file") from None

    def _place(self, file: int, value: str) -> Path:
        return Path(self._root or self._paths[file].parent) / value

    def _all_keys(self, name: str) -> list[str]:
        """The key column, fit for members' names. UserError if two are the same."""
        keys: list[str] = []
        for path in self._paths:
            keys += [_key(value) for value in column_of(path, name)]
        seen: dict[str, int] = {}
        for number, key in enumerate(keys):
            if not key.rpartition("/")[2] or seen.setdefault(key, number) != number:
                problem = f"is also that of row {seen[key]}" if key in seen else "is empty"
                raise UserError(
                    f"column {name!r}: the key {key!r} of row {number} {problem}; keys are unique: "
                    "name another column with --key-column, or none for the rows' numbers"
                )
        return keys

    def _table(self, group: int) -> dict[str, Any]:
        """The columns of a row group; of handles and tables each process has its own."""
        if self._process != os.getpid():
            self._files, self._tables, self._process = {}, OrderedDict(), os.getpid()
        table = self._tables.get(group)
        if table is None:
            file, within = (int(value) for value in self._groups[group, :2])
            if file not in self._files:
                self._files = {file: _parquet().ParquetFile(self._paths[file])}
            read = self._files[file].read_row_group(within, columns=self._columns.read, use_threads=False)
            table = self._tables[group] = {name: read.column(name) for name in read.column_names}
            while len(self._tables) > 1 and (
                len(self._tables) > CACHED_GROUPS
                or sum(column.nbytes for kept in self._tables.values() for column in kept.values())
                > CACHED_BYTES
            ):
                self._tables.popitem(last=False)
        self._tables.move_to_end(group)
        return table


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
        if missing or _image_kind(schema.field(columns.image)) != columns.image_kind:
            what = f"no column {missing[0]!r}" if missing else f"column {columns.image!r} has another type"
            raise UserError(
                f"{path}: {what}, unlike {paths[0]}; convert files of different columns on their own"
            )
    names = _class_names(schemas[paths[0]], columns.cls)
    files = {"classnames.txt": "".join(f"{name}\n" for name in names)} if names else {}
    splits = [Rows(name, part, columns, options.root, files) for name, part in _splits(paths).items()]
    notes = [] if columns.captions else [f"no column of captions among {', '.join(schemas[paths[0]].names)}"]
    kept = set(columns.read)
    left = [name for name in schemas[paths[0]].names if name not in kept]
    notes += [f"columns that are not taken: {', '.join(left)}"] if left else []
    if sum(len(split) for split in splits) == 0:
        raise UserError(f"{', '.join(map(str, inputs))}: the files hold no row")
    return Source([split for split in splits if len(split)], [InputFile.of(path) for path in paths], notes)


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
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from None


def _choose(schema: Any, options: Options, path: Path) -> Columns:
    """The columns asked for, or found by type and name."""
    for name in _asked(options):
        if name not in schema.names:
            raise UserError(f"{path}: no column {name!r}; its columns are {', '.join(schema.names)}")
    image = options.image_column or _image_column(schema, path)
    kind = _image_kind(schema.field(image))
    if kind is None:
        raise UserError(f"{path}: column {image!r} holds {schema.field(image).type}, neither bytes nor paths")
    by_name = [name for name in CAPTIONS if name in schema.names and name != image][:1]
    captions = list(options.caption_column) or [name for name in by_name if _is_text(schema.field(name).type)]
    cls = options.class_column or next(
        (n for n in _CLASSES if n in schema.names and _is_integer(schema.field(n).type)), None
    )
    if cls and not _is_integer(schema.field(cls).type):
        raise UserError(f"{path}: column {cls!r} holds {schema.field(cls).type}; a class is an integer")
    used = {image, cls, *captions}
    others = [
        name
        for name in schema.names
        if name not in {*used, "captions"} and _image_kind(schema.field(name)) in (None, "path")
    ]
    fields = [name for name in options.json_column if name != "-"] or ([] if options.json_column else others)
    failure = tuple(name for name in _FAILURE if name in schema.names)
    return Columns(image, kind, tuple(captions), cls, options.key_column or None, tuple(fields), failure)


def _asked(options: Options) -> list[str]:
    named = (options.image_column, options.class_column, options.key_column)
    columns = [name for name in options.json_column if name != "-"]
    return [*filter(None, named), *options.caption_column, *columns]


def _image_column(schema: Any, path: Path) -> str:
    binary = [name for name in schema.names if _image_kind(schema.field(name)) in ("bytes", "struct")]
    if len(binary) == 1:
        return binary[0]
    named = [
        name for name in IMAGE_PATHS if name in schema.names and _image_kind(schema.field(name)) == "path"
    ]
    if not binary and named:
        return named[0]
    what = (
        f"several columns of bytes ({', '.join(binary)})" if binary else "no column of image bytes or paths"
    )
    raise UserError(f"{path}: {what}; name it with --image-column; its columns are {', '.join(schema.names)}")


def _image_kind(field: Any) -> str | None:
    """How a column can hold images: bytes, struct, path; None: not at all."""
    from pyarrow import types

    kind = field.type
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "bytes"
    if types.is_struct(kind):
        inner = kind.get_field_index("bytes")
        return "struct" if inner >= 0 and _image_kind(kind.field(inner)) == "bytes" else None
    return "path" if types.is_string(kind) or types.is_large_string(kind) else None


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return _is_text(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _is_integer(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind))


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
    "parquet files with a column of image bytes (img2dataset's, Hugging Face's) or of image paths",
    open_rows,
    inputs="Parquet files, or folders of them.",
    options=Options,
)
