"""Chinese-CLIP's `SPLIT_imgs.tsv` (id, tab, base64) and `SPLIT_texts.jsonl`, as they are.

Samples go as the images are listed; an image's captions are the texts whose `image_ids` hold it, in the order
of their file, unprocessed.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipcluster.errors import UserError
from tools.convert.readers.byte_ranges import ByteRanges
from tools.convert.readers.image_texts import NO_ID, JoinedSplit, repeated
from tools.convert.records import InputFile, Kind, NoOptions, Source

_FILE = re.compile(r"(.+)_(imgs\.tsv|texts\.jsonl)")
_IMAGES, _TEXTS = "imgs.tsv", "texts.jsonl"
_ID = re.compile(rb"0|[1-9][0-9]{0,17}")
_BOM = b"\xef\xbb\xbf"
_WANTED = "convert chinese-clip takes a folder with SPLIT_imgs.tsv and SPLIT_texts.jsonl, or such files"


class _Images:
    """The lines of an `_imgs.tsv`: where the base64 of each begins and ends."""

    def __init__(self, path: Path) -> None:
        self.faults: dict[int, tuple[str, str]] = {}
        self._file = ByteRanges(path)
        ids, self._offset, self._size = array("q"), array("q"), array("q")
        for line, offset, text in _lines(path):
            key, tab, rest = text.partition(b"\t")
            usable = tab and _ID.fullmatch(key.strip())
            if not usable:
                self.faults[len(ids)] = (
                    f"line-{line}",
                    f"{path.name}, line {line}: expected a number, a tab and base64",
                )
            ids.append(int(key) if usable else NO_ID)
            self._offset.append(offset + len(text) - len(rest))
            self._size.append(len(rest))
        self.ids = np.array(ids, np.int64)
        for number in repeated(self.ids):
            self.faults[number] = (
                str(self.ids[number]),
                f"{path.name}: the id also appears on an earlier line",
            )
            self.ids[number] = NO_ID

    def sizes(self) -> np.ndarray:
        return np.array(self._size, np.int64)

    def read(self, number: int) -> bytes:
        return self._file.read(self._offset[number], self._size[number])


class _Text(NamedTuple):
    text_id: Any
    text: str
    image_ids: list[int]

    @classmethod
    def parse(cls, line: bytes) -> _Text:
        """A line of `_texts.jsonl`. ValueError saying what is wrong with it."""
        document = json.loads(line.decode())
        if not isinstance(document, dict) or not {"text_id", "text", "image_ids"} <= document.keys():
            raise ValueError("expected an object with text_id, text and image_ids")
        text, images = document["text"], document["image_ids"]
        if not isinstance(text, str) or not isinstance(images, list):
            raise ValueError("text is not a string, or image_ids is not a list")
        if not all(type(image) is int and 0 <= image < 2**63 for image in images):
            raise ValueError("image_ids holds a value that is not an id")
        text.encode()  # half a surrogate pair is a UnicodeEncodeError, and that a ValueError
        return cls(document["text_id"], text, images)


class _Texts:
    """The lines of a `_texts.jsonl`, and the pairs they make."""

    def __init__(self, path: Path | None) -> None:
        self.count = self.without_image = 0
        self.broken: list[tuple[str, str]] = []
        self._file = ByteRanges(path) if path else None
        self._line, self._offset, self._size = array("q"), array("q"), array("q")  # line: of a pair
        images = array("q")
        for line, offset, data in _lines(path) if path else ():
            try:
                text = _Text.parse(data)
            except ValueError as error:
                self.broken.append((f"text-line-{line}", f"{path.name}, line {line}: {error}"))  # type: ignore[union-attr]
                continue
            images.extend(text.image_ids)
            self._line.extend([self.count] * len(text.image_ids))
            self._offset.append(offset)
            self._size.append(len(data))
            self.count += 1
            self.without_image += not text.image_ids
        self.image_ids = np.array(images, np.int64)

    def read(self, pair: int) -> tuple[Any, str]:
        line = self._line[pair]
        assert self._file is not None
        text = _Text.parse(self._file.read(self._offset[line], self._size[line]))
        return text.text_id, text.text


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number from 1, offset and bytes of every line that is not empty, without a byte order mark."""
    offset = 0
    with open(path, "rb", buffering=1 << 20) as file:
        for number, line in enumerate(file, 1):
            mark = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
            if line.strip():
                yield number, offset + mark, line[mark:]
            offset += len(line)


def open_chinese_clip(inputs: Sequence[Path], options: NoOptions) -> Source:
    """The splits whose images are there, by name. UserError where there are none."""
    found: dict[str, dict[str, Path]] = {}
    for path in inputs:
        for file in _files(path):
            match = _FILE.fullmatch(file.name)
            if match is None:
                raise UserError(f"{file}: {_WANTED}")
            if found.setdefault(match[1], {}).setdefault(match[2], file) != file:
                raise UserError(
                    f"{file} and {found[match[1]][match[2]]} belong to one split: give one of them"
                )
    splits, notes = [], []
    used: list[Path] = []
    for name in sorted(found):
        images, texts = found[name].get(_IMAGES), found[name].get(_TEXTS)
        if images is None:
            notes.append(f"{name} was left out: {texts} is there, {name}_{_IMAGES} is not")
            continue
        if texts is None:
            notes.append(f"{name}: {name}_{_TEXTS} is not there: images without captions")
        split = JoinedSplit(name, _Images(images), _Texts(texts))
        splits.append(split)
        notes += split.notes()
        used += [path for path in (images, texts) if path]
    if not splits:
        where = "; ".join(notes) or ", ".join(map(str, inputs)) or "no INPUT was given"
        raise UserError(f"{where}: no images there; {_WANTED}")
    return Source(splits, [InputFile.of(path) for path in used], notes)


def _files(path: Path) -> list[Path]:
    """Those files of a folder that are Chinese-CLIP's, or the file given. UserError: it is not there."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if _FILE.fullmatch(file.name))
    if not path.is_file():
        raise UserError(f"{path} is not there; {_WANTED}")
    return [path]


KIND = Kind(
    "Chinese-CLIP's text files: SPLIT_imgs.tsv with images in base64, SPLIT_texts.jsonl.",
    open_chinese_clip,
    "a folder with these files, or the files one by one",
)
