"""Where COCO's files lie: in its zips, in the folders those extract to, or some here and some there.

Members of a zip are read by name without extracting it: its list is read once, its members by offset.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from clipcluster.errors import UserError
from tools.convert.readers.open_file import OpenFile
from tools.convert.records import InputFile

WANTED = (
    "train2017.zip, val2017.zip and annotations_trainval2017.zip (if wanted: test2017.zip and "
    "image_info_test2017.zip) or the folders in them, in one folder or each as an INPUT; likewise of 2014"
)
_IMAGES = re.compile(r"(train|val|test)(2014|2017)")
_TEXTS = re.compile(r"(captions_(train|val)|image_info_test)(2014|2017)\.json")
_ZIP = re.compile(r"((train|val|test)|annotations_trainval|image_info_test)(2014|2017)\.zip")
_LOCAL = struct.Struct("<4s22xHH")  # a member's own header: signature, …, lengths of name and extra field
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1


class DamagedMember(Exception):
    """A member that is not what the zip's list says of it."""


class ImageFolder(NamedTuple):
    """Image files by name: the size of each, and `read`.

    Of one that is not there it raises KeyError or FileNotFoundError; also DamagedMember.
    """

    state: InputFile
    sizes: Mapping[str, int]
    read: Callable[[str], bytes]


class Text(NamedTuple):
    """A file of annotations: the file on disk that holds it, perhaps a zip, and what reads it."""

    path: Path
    read: Callable[[], bytes]


class CocoFiles:
    """What lies in the inputs: image folders by name (`train2017`), and files of annotations by name.

    Where a thing is there twice, the first input wins, and in one folder the zip, which is whole where an
    extracted folder may not be.
    """

    def __init__(self, inputs: Sequence[Path]) -> None:
        """UserError for an input that is not there or nothing of COCO's."""
        self.images: dict[str, ImageFolder] = {}
        self.texts: dict[str, Text] = {}
        for path in inputs:
            self._add(path)
        if not self.images:
            where = ", ".join(map(str, inputs)) or "no INPUT was given"
            raise UserError(f"{where}: no images of COCO there; convert coco takes {WANTED}")

    def text(self, name: str) -> Mapping[str, Any]:
        """A file of annotations, parsed. UserError if it is none."""
        path, read = self.texts[name]
        try:
            return document(read(), str(path) if path.name == name else f"{path}: {name}")
        except DamagedMember as error:
            raise UserError(f"{name}: {error}; download the zip again") from None

    def _add(self, path: Path) -> None:
        if path.is_dir():
            if _IMAGES.fullmatch(path.name):
                if path.name not in self.images:
                    self.images[path.name] = _extracted(path)
            else:
                self._add_folder(path)
        elif not path.exists():
            raise UserError(f"{path} is not there; convert coco takes {WANTED}")
        elif _TEXTS.fullmatch(path.name):
            self.texts.setdefault(path.name, Text(path, path.read_bytes))
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
        members, file = _members(path), OpenFile(path)
        folders: dict[str, dict[str, zipfile.ZipInfo]] = {}
        for name, info in members.items():
            folder, _, base = name.rpartition("/")
            if _TEXTS.fullmatch(base):
                self.texts.setdefault(base, Text(path, partial(_read, file, members, name)))
            elif _IMAGES.fullmatch(folder.rpartition("/")[2]):
                folders.setdefault(folder, {})[base] = info
        for folder, images in folders.items():
            sizes = {name: info.file_size for name, info in images.items()}
            opened = ImageFolder(InputFile.of(path), sizes, partial(_read, file, images))
            self.images.setdefault(folder.rpartition("/")[2], opened)


def _extracted(folder: Path) -> ImageFolder:
    with os.scandir(folder) as entries:
        states = {entry.name: entry.stat() for entry in entries if entry.is_file()}
    files = ((name, states[name].st_size, states[name].st_mtime_ns) for name in sorted(states))
    sizes = {name: state.st_size for name, state in states.items()}
    state = InputFile.of_many(os.path.abspath(folder), files)
    return ImageFolder(state, sizes, lambda name: (folder / name).read_bytes())


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The list of a zip by name. UserError for a file that is no whole zip, or one that is encrypted."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is not a complete zip ({error}), as after an interrupted download: download it again"
        ) from None
    for name, info in members.items():
        if info.flag_bits & _ENCRYPTED or info.compress_type not in _METHODS:
            raise UserError(
                f"{path}: {name} is encrypted or packed by method {info.compress_type}; only stored and "
                "deflated members can be read: extract it and give the folder"
            )
    return members


def _read(file: OpenFile, members: Mapping[str, zipfile.ZipInfo], name: str) -> bytes:
    """A member's bytes. KeyError: no such member; DamagedMember; OSError where the disk fails."""
    member = members[name]
    signature, name_bytes, extra = _LOCAL.unpack(file.read(member.header_offset, _LOCAL.size))
    if signature != b"PK\x03\x04":
        raise DamagedMember(f"no member begins at byte {member.header_offset:,} of {file.path.name}")
    data = file.read(member.header_offset + _LOCAL.size + name_bytes + extra, member.compress_size)
    if member.compress_type == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompress(data, -zlib.MAX_WBITS)
        except zlib.error as error:
            raise DamagedMember(f"cannot be unpacked from {file.path.name}: {error}") from None
    if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
        raise DamagedMember(f"not what the checksum in {file.path.name} says")
    return data


def document(data: bytes, what: str) -> Mapping[str, Any]:
    """A JSON file with a list of images. UserError naming `what` if it is none."""
    try:
        read = json.loads(data)
    except ValueError as error:
        raise UserError(f"{what} is not complete JSON ({error}); download it again") from None
    if not isinstance(read, dict) or not isinstance(read.get("images"), list):
        raise UserError(f"{what} has no list 'images': not one of COCO's files")
    return read
