"""Chinese-CLIP's databases: `lmdb/SPLIT/imgs` (base64 by id) and `pairs` (pickled image_id, text_id, text).

A database's cursor goes by bytes, `12` before `7`; samples and an image's texts go by number. Pickles are
read by an unpickler that knows tuples, numbers and strings alone.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.errors import UserError
from tools.convert.readers.chinese_clip import NO_ID, Images, Texts, joined
from tools.convert.records import InputFile, Kind, NoOptions, Source, Split

_NUMBER = re.compile(rb"0|[1-9][0-9]{0,17}")
_DATA = "data.mdb"
_WANTED = "convert lmdb takes Chinese-CLIP's folder lmdb with SPLIT/imgs and SPLIT/pairs, or one such SPLIT"
_COUNTERS = (b"num_images", b"num_samples")  # keys of what a database says it holds
# A path may be open once in a process, and an environment may be used by the process alone that opened it.
_environments: dict[str, Any] = {}
os.register_at_fork(after_in_child=_environments.clear)


class _Database:
    """A folder with a `data.mdb`, opened on first use in every process."""

    def __init__(self, folder: Path) -> None:
        """UserError: no database, or one that was cut: reading beyond its end would kill the process."""
        self.path = str(folder.resolve())
        self.said = "nothing"
        _environments.pop(self.path, None)
        try:
            environment = self._environment()
            wanted = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        except _lmdb().Error as error:
            raise UserError(f"{folder} is not a readable database: {error}") from None
        found = (folder / _DATA).stat().st_size
        if found < wanted:
            raise UserError(f"{folder / _DATA} was cut, it has {found:,} of {wanted:,} bytes: copy it again")

    def items(self) -> Iterator[tuple[bytes, memoryview]]:
        """Every key and value in the order of the keys' bytes; a value may be looked at until the next.

        A counter is kept in `said` instead.
        """
        try:
            with self._environment().begin(buffers=True) as view:
                for key, value in ((bytes(key), value) for key, value in view.cursor()):
                    if key in _COUNTERS:
                        self.said = bytes(value).decode("utf-8", "replace")
                    else:
                        yield key, value
        except _lmdb().Error as error:
            raise UserError(f"{self.path} is damaged: {error}") from None

    def get(self, number: int) -> bytes:
        """The value of a number. OSError: it is gone, or cannot be read."""
        try:
            with self._environment().begin() as view:
                value: bytes | None = view.get(b"%d" % number)
        except _lmdb().Error as error:
            raise OSError(errno.EIO, str(error), self.path) from None
        if value is None:
            raise OSError(errno.EIO, f"the key {number} is gone", self.path)
        return value

    def _environment(self) -> Any:
        if self.path not in _environments:
            options = {"readonly": True, "lock": False, "create": False, "readahead": False}
            _environments[self.path] = _lmdb().open(self.path, **options)
        return _environments[self.path]


def _lmdb() -> Any:
    """The package. UserError: it is not installed."""
    try:
        import lmdb
    except ImportError:
        raise UserError("convert lmdb needs the package lmdb: pip install 'clipcluster[lmdb]'") from None
    return lmdb


def _images(database: _Database) -> Images:
    """The database `imgs`: ids in their order as numbers, then keys that are none."""
    ids, sizes, others = array("q"), array("q"), []
    for key, value in database.items():
        if _NUMBER.fullmatch(key):
            ids.append(int(key))
            sizes.append(len(value))
        else:
            others.append(key.decode("utf-8", "replace"))
    order = np.argsort(np.array(ids, np.int64))
    numbers = np.append(np.array(ids, np.int64)[order], np.full(len(others), NO_ID))
    lengths = np.append(np.array(sizes, np.int64)[order], np.zeros(len(others), np.int64))
    reason = f"a key of {database.path} that is not the id of an image"
    faults = {number: (name, reason) for number, name in enumerate(others, len(ids))}
    return Images(numbers, lengths, faults, lambda number: database.get(int(numbers[number])))


def _texts(database: _Database) -> Texts:
    """The database `pairs` in the order of its keys as numbers."""
    broken: list[tuple[str, str]] = []
    pairs = array("q")  # key, image_id, text_id of each
    for key, value in database.items():
        try:
            if not _NUMBER.fullmatch(key):
                raise ValueError("a key that is not a number")
            image_id, text_id, _ = _pair(bytes(value))
            pairs.extend((int(key), image_id, text_id))
        except ValueError as error:
            name = key.decode("utf-8", "replace")
            broken.append((f"pair-{name}", f"{database.path}, key {name}: {error}"))
    table = np.array(pairs, np.int64).reshape(-1, 3)
    keys, image_ids, text_ids = table[np.argsort(table[:, 0])].T

    def read(pair: int) -> tuple[Any, str]:
        _, text_id, text = _pair(database.get(int(keys[pair])))
        return text_id, text

    # texts without an image are not put into a database
    return Texts(image_ids, len(np.unique(text_ids)), 0, broken, read)


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles what needs no import: tuples, numbers, strings."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuses every class and function."""
        raise pickle.UnpicklingError(f"a pickle that asks for {module}.{name}")


def _pair(data: bytes) -> tuple[int, int, str]:
    """image_id, text_id and text. ValueError: something else."""
    try:
        pair = _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise ValueError(f"not a readable pickle: {error}") from None
    if not isinstance(pair, tuple) or [type(part) for part in pair] != [int, int, str]:
        raise ValueError("a pickle, but not of (image_id, text_id, text)")
    image_id, text_id, text = pair
    if not (0 <= image_id < 2**63 and abs(text_id) < 2**63):
        raise ValueError(f"image {image_id}, text {text_id}: no ids")
    text.encode()  # half a surrogate pair is a UnicodeEncodeError, and that a ValueError
    return image_id, text_id, text


def open_lmdb(inputs: Sequence[Path], options: NoOptions) -> Source:
    """The splits that the folders hold, by name. UserError where they hold none."""
    folders: dict[str, Path] = {}
    for path in inputs:
        for folder in _splits(path):
            if folders.setdefault(folder.resolve().name, folder) != folder:
                raise UserError(
                    f"{folder} and {folders[folder.name]} are both called {folder.name}: convert one"
                )
    if not folders:
        raise UserError(
            f"{', '.join(map(str, inputs)) or 'no INPUT was given'}: no such databases; {_WANTED}"
        )
    splits: list[Split] = []
    notes: list[str] = []
    used: list[InputFile] = []
    for name, folder in sorted(folders.items()):
        databases = _Database(folder / "imgs"), _Database(folder / "pairs")
        images, texts = _images(databases[0]), _texts(databases[1])
        split, found_in_it = joined(name, images, texts)
        splits.append(split)
        notes += found_in_it
        counts = len(images.ids) - len(images.faults), len(texts.image_ids) + len(texts.broken)
        for counter, database, count in zip(_COUNTERS, databases, counts, strict=True):
            if database.said != str(count):
                notes.append(f"{name}: {counter.decode()} is {database.said}, but {count:,} are there")
        used += [InputFile.of(folder / part / _DATA) for part in ("imgs", "pairs")]
    return Source(splits, used, notes)


def _splits(path: Path) -> list[Path]:
    """The splits in a folder: itself, or those in it or in its `lmdb`. UserError: one lacks a database."""
    if not path.is_dir():
        raise UserError(f"{path} is not an existing folder; {_WANTED}")
    parent = path / "lmdb" if (path / "lmdb").is_dir() else path
    found = []
    for folder in [path, *sorted(parent.iterdir())]:
        there = [name for name in ("imgs", "pairs") if (folder / name / _DATA).is_file()]
        if len(there) == 1:
            missing = "pairs" if there == ["imgs"] else "imgs"
            raise UserError(f"{folder} has {there[0]}/{_DATA} but no {missing}/{_DATA}; {_WANTED}")
        if there:
            found.append(folder)
    return found


KIND = Kind(
    "Chinese-CLIP's databases: lmdb/SPLIT/imgs and lmdb/SPLIT/pairs.",
    open_lmdb,
    "the folder lmdb, the one it is in, or one SPLIT of it",
)
