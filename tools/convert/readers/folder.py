"""Folders of images, one folder a class, as torchvision's ImageFolder reads them.

The class is the top-level folder, in the order of their names; files in folders below count with it.
What is an image is decided by content. If all top-level folders are called train, val, valid, validation or
test, and hold folders themselves, each is a split, and all splits share one numbering of the classes.
"""

from __future__ import annotations

import hashlib
import os
import stat
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from clipcluster.data.shards.captions import CLASS_NAMES, TEMPLATES, class_names
from clipcluster.errors import UserError
from tools.convert.readers.open_file import OpenFile
from tools.convert.records import BadRecord, InputFile, Kind, Record, Source, Split, option

SPLITS = frozenset(["train", "val", "valid", "validation", "test"])
_OPEN_DIRECTORIES = 64  # at most, in each process
_NO_FILE = -1  # the size of what is no regular file: a broken link, a pipe


@dataclass(frozen=True)
class FolderOptions:
    """The options of `convert folder`."""

    classnames: Path | None = option(
        None,
        "Class names: one per line in the folders' order, or FOLDER<tab>NAME. Default: the folders'.",
        metavar="FILE",
    )
    template: tuple[str, ...] = option(
        (), "A caption with {c} for the class name; may be repeated. Default: no captions.", metavar="TEXT"
    )


@dataclass(frozen=True)
class _Directory:
    """The files of one directory, by their names. `key` begins the keys of its samples."""

    path: str
    key: str
    cls: int
    names: list[str]
    sizes: list[int]  # bytes
    mtimes: list[int]  # ns
    special: dict[int, str]  # keys that are not the name without its extension


def _split(
    name: str, directories: Sequence[_Directory], captions: Sequence[Sequence[str]], texts: Mapping[str, str]
) -> Split:
    """The files of these directories, one directory after the other."""
    ends = np.cumsum([len(part.names) for part in directories], dtype=np.int64).tolist()
    # the files of a directory that is open are found without walking down to it
    opened = lru_cache(_OPEN_DIRECTORIES)(lambda part: OpenFile(directories[part].path, os.O_DIRECTORY))

    def sizes() -> np.ndarray:
        return np.maximum(np.concatenate([np.array(part.sizes, np.int64) for part in directories]), 0)

    def read(number: int) -> Record:
        part = bisect_right(ends, number)
        directory = directories[part]
        place = number - ends[part] + len(directory.names)
        name, size = directory.names[place], directory.sizes[place]
        key = directory.key + directory.special.get(place, name.rpartition(".")[0] or name)
        if size == _NO_FILE:
            raise BadRecord(key, "no file: a broken link, or not a regular file")
        data = _read(name, size, opened(part).fd)
        return Record(key, data, captions[directory.cls], {}, directory.cls)

    return Split(name, ends[-1], sizes, read, texts)


def _read(name: str, size: int, folder: int) -> bytes:
    """A whole file of an open directory, of which `size` bytes are expected."""
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        data = os.read(fd, size + 1)
        while len(data) != size and (more := os.read(fd, 1 << 20)):  # it changed, or reads come in pieces
            data += more
        return data
    finally:
        os.close(fd)


def _special_keys(names: Sequence[str]) -> dict[int, str]:
    """Keys other than the name without its extension, by place in a directory: where that has dots, or where
    two files would share it.

    Dots become underscores; of files that share a key all but the first take their extension into it, and
    where that is not enough underscores are appended.
    """
    stems = [name.rpartition(".")[0] or name for name in names]
    if len(set(stems)) == len(stems) and not any("." in stem for stem in stems):
        return {}
    special: dict[int, str] = {}
    used: set[str] = set()
    for place, (name, stem) in enumerate(zip(names, stems, strict=True)):
        key = stem.replace(".", "_")
        if key in used:
            key = name.replace(".", "_")
        while key in used:
            key += "_"
        used.add(key)
        if key != stem:
            special[place] = key
    return special


def _open(inputs: Sequence[Path], options: FolderOptions) -> Source:
    if len(inputs) != 1:
        raise UserError(f"convert folder: {len(inputs)} inputs were given; give one folder of class folders")
    (root,) = inputs
    if not root.is_dir():
        raise UserError(
            f"convert folder: {root} is not a folder; give a folder that holds a folder for each class"
        )
    splits, notes = _splits(str(root))
    folders = sorted({name for classes in splits.values() for name in classes})
    if not folders:
        raise UserError(
            f"convert folder: {root} holds no class folders; for images with captions in a table there is: "
            "convert csv"
        )
    numbers = {name: number for number, name in enumerate(folders)}
    classnames = _classnames(options.classnames, folders)
    captions = class_captions(classnames, options.template)
    files = {CLASS_NAMES: classnames, **({TEMPLATES: options.template} if options.template else {})}
    texts = {name: "".join(f"{line}\n" for line in lines) for name, lines in files.items()}
    parts, read = [], []
    for split, classes in splits.items():
        directories = []
        for name, path in sorted(classes.items()):
            found = _walk(path, f"{name}/", numbers[name])
            directories += found
            read.append(_state(path, found))
        parts.append(_split(split, directories, captions, texts))
    if options.classnames is not None:
        read.append(InputFile.of(options.classnames))
    return Source(parts, read, notes)


def class_captions(classnames: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """The captions of every class. UserError: a template of several lines, or without {c} for the name."""
    for template in templates:
        if "{c}" not in template or "\n" in template:
            raise UserError(f"--template {template!r}: a template is one line with {{c}} for the class name")
    return [[text.replace("{c}", name) for text in templates] for name in classnames]


def _splits(root: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Split -> class folder -> its path, and notes; the split "" where the classes lie in `root` itself."""
    notes: list[str] = []
    below = _folders(root, notes)
    if below and set(below) <= SPLITS:
        of_splits: list[str] = []
        splits = {name: _folders(below[name], of_splits) for name in sorted(below)}
        if all(splits.values()):
            return splits, notes + of_splits
    return {"": below}, notes


def _folders(path: str, notes: list[str]) -> dict[str, str]:
    """The folders in a folder, by name; says how many files lie beside them. Hidden ones do not count."""
    entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
    folders = {entry.name: entry.path for entry in entries if entry.is_dir()}
    if len(folders) < len(entries):
        notes.append(f"{path}: {len(entries) - len(folders):,} files in no class folder are left out")
    return folders


def _walk(path: str, key: str, cls: int, above: frozenset[tuple[int, int]] = frozenset()) -> list[_Directory]:
    """The files below a class folder, directory by directory. A link back to a folder above is left out."""
    files: list[tuple[str, int, int]] = []  # name, bytes, mtime in ns
    below: list[str] = []
    folder = OpenFile(path, os.O_DIRECTORY)
    here = os.fstat(folder.fd)
    above |= {(here.st_dev, here.st_ino)}
    for entry in os.scandir(folder.fd):  # one stat tells all there is to know; relative to fd it is quick
        name = entry.name
        if name[0] == ".":
            continue
        try:
            state = entry.stat()
        except FileNotFoundError:
            files.append((name, _NO_FILE, 0))
            continue
        if stat.S_ISREG(state.st_mode):
            files.append((name, state.st_size, state.st_mtime_ns))
        elif not stat.S_ISDIR(state.st_mode):
            files.append((name, _NO_FILE, state.st_mtime_ns))
        elif (state.st_dev, state.st_ino) not in above:
            below.append(name)
    files.sort()
    names, sizes, mtimes = ([file[column] for file in files] for column in range(3))
    directories = [_Directory(path, key, cls, names, sizes, mtimes, _special_keys(names))]  # type: ignore[arg-type]
    for name in sorted(below):
        directories += _walk(f"{path}/{name}", f"{key}{name}/", cls, above)
    return directories


def _state(path: str, directories: Sequence[_Directory]) -> InputFile:
    """One entry for all files below a class folder."""
    digest = hashlib.sha256()
    for part in directories:
        names = "\0".join([part.key, *part.names]).encode("utf-8", "surrogateescape")
        digest.update(names + np.array([part.sizes, part.mtimes], np.int64).tobytes())
    latest = max((max(part.mtimes) for part in directories if part.names), default=0)
    size = sum(sum(part.sizes) for part in directories)
    return InputFile(path, size, latest, digest.hexdigest())


def _classnames(path: Path | None, folders: Sequence[str]) -> list[str]:
    """The name of every class. UserError: a file that does not name each of them once."""
    if path is None:
        return [os.fsencode(name).decode("utf-8", "replace") for name in folders]
    try:
        lines = class_names(path.read_bytes(), f"--classnames {path}")
    except OSError as error:
        raise UserError(
            f"--classnames {path}: cannot be read ({error}); give a file of UTF-8 lines"
        ) from None
    if lines and all("\t" in line for line in lines):
        names = dict(line.split("\t", 1) for line in lines)
        missing = [name for name in folders if name not in names]
        if missing:
            raise UserError(f"--classnames {path}: no line for the class folder {missing[0]!r}")
        return [names[name] for name in folders]
    if len(lines) != len(folders):
        raise UserError(
            f"--classnames {path}: {len(lines)} lines for {len(folders)} class folders; give one line for "
            "each in the order of the folders' names, or lines FOLDER<tab>NAME"
        )
    return lines


KIND = Kind(
    "Class folders of images.",
    _open,
    inputs="A folder of class folders, or of train, val and test with them.",
    options=FolderOptions,
    takes_all_below=True,
)
