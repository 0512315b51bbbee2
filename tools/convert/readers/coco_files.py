"""Where COCO's files lie: in its zips, in the folders those extract to, or some here and some there."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from tools.convert.readers.zip_members import DamagedMember, ZipMembers
from tools.convert.records import InputFile

WANTED = (
    "train2017.zip, val2017.zip and annotations_trainval2017.zip (if wanted: test2017.zip and "
    "image_info_test2017.zip) or the folders in them, in one folder or each as an INPUT; likewise of 2014"
)
_IMAGES = re.compile(r"(train|val|test)(2014|2017)")
_TEXTS = re.compile(r"(captions_(train|val)|image_info_test)(2014|2017)\.json")
_ZIP = re.compile(r"((train|val|test)|annotations_trainval|image_info_test)(2014|2017)\.zip")


@dataclass(frozen=True)
class _Extracted:
    """Image files by name: of one that is not there `size` raises KeyError, `read` FileNotFoundError."""

    where: Path

    @cached_property
    def _states(self) -> dict[str, tuple[int, int]]:
        """Bytes and time of every file."""
        with os.scandir(self.where) as entries:
            states = {entry.name: entry.stat() for entry in entries if entry.is_file()}
        return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}

    def state(self) -> InputFile:
        return InputFile.of_many(
            os.path.abspath(self.where), ((name, *self._states[name]) for name in sorted(self._states))
        )

    def names(self) -> Set[str]:
        return self._states.keys()

    def size(self, name: str) -> int:
        return self._states[name][0]

    def read(self, name: str) -> bytes:
        return (self.where / name).read_bytes()


@dataclass(frozen=True)
class _Zipped:
    """The same of a folder in a zip; `read` raises KeyError, or DamagedMember."""

    archive: ZipMembers
    prefix: str  # with its slash

    def state(self) -> InputFile:
        return InputFile.of(self.archive.path)

    def names(self) -> Set[str]:
        inside = (name.removeprefix(self.prefix) for name in self.archive if name.startswith(self.prefix))
        return {name for name in inside if "/" not in name}

    def size(self, name: str) -> int:
        return self.archive.size(self.prefix + name)

    def read(self, name: str) -> bytes:
        return self.archive.read(self.prefix + name)


ImageFolder = _Extracted | _Zipped


class CocoFiles:
    """What lies in the inputs: image folders by name (`train2017`), and files of annotations by name.

    Where a thing is there twice, the first input wins, and in one folder the zip, which is whole where an
    extracted folder may not be.
    """

    def __init__(self, inputs: Sequence[Path]) -> None:
        """UserError for an input that is not there or nothing of COCO's."""
        self.images: dict[str, ImageFolder] = {}
        self._texts: dict[str, Path | tuple[ZipMembers, str]] = {}
        for path in inputs:
            self._add(path)
        if not self.images:
            where = ", ".join(map(str, inputs)) or "no INPUT was given"
            raise UserError(f"{where}: no images of COCO there; convert coco takes {WANTED}")

    def has_text(self, name: str) -> bool:
        return name in self._texts

    def text_path(self, name: str) -> Path:
        """The file on disk, perhaps a zip, that holds a file of annotations."""
        where = self._texts[name]
        return where if isinstance(where, Path) else where[0].path

    def text(self, name: str) -> Mapping[str, Any]:
        """A file of annotations, parsed. UserError if it is none."""
        where = self._texts[name]
        try:
            data = where.read_bytes() if isinstance(where, Path) else where[0].read(where[1])
        except DamagedMember as error:
            raise UserError(f"{name}: {error}; download the zip again") from None
        return document(data, str(where) if isinstance(where, Path) else f"{where[0].path}: {where[1]}")

    def _add(self, path: Path) -> None:
        if path.is_dir():
            if _IMAGES.fullmatch(path.name):
                self.images.setdefault(path.name, _Extracted(path))
            else:
                self._add_folder(path)
        elif not path.exists():
            raise UserError(f"{path} is not there; convert coco takes {WANTED}")
        elif _TEXTS.fullmatch(path.name):
            self._texts.setdefault(path.name, path)
        elif path.suffix == ".zip" or zipfile.is_zipfile(path):
            self._add_zip(path)
        else:
            raise UserError(f"{path} is neither a zip nor a file of COCO's; convert coco takes {WANTED}")

    def _add_folder(self, path: Path) -> None:
        inside = sorted(path.iterdir())
        for zipped in inside:
            if _ZIP.fullmatch(zipped.name):
                self._add_zip(zipped)
        for other in inside:
            if other.is_dir() and other.name in ("annotations", "images"):
                self._add_folder(other)
            elif _IMAGES.fullmatch(other.name) or _TEXTS.fullmatch(other.name):
                self._add(other)

    def _add_zip(self, path: Path) -> None:
        archive = ZipMembers(path)
        for name in archive:
            folder, _, base = name.rpartition("/")
            images = folder.rpartition("/")[2]
            if _TEXTS.fullmatch(base):
                self._texts.setdefault(base, (archive, name))
            elif _IMAGES.fullmatch(images) and images not in self.images:
                self.images[images] = _Zipped(archive, folder + "/")


def document(data: bytes, what: str) -> Mapping[str, Any]:
    """A JSON file with a list of images. UserError naming `what` if it is none."""
    try:
        read = json.loads(data)
    except ValueError as error:
        raise UserError(f"{what} is not complete JSON ({error}); download it again") from None
    if not isinstance(read, dict) or not isinstance(read.get("images"), list):
        raise UserError(f"{what} has no list 'images': not one of COCO's files")
    return read
