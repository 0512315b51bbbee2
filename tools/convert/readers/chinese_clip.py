"""Chinese-CLIP's `SPLIT_imgs.tsv` (id, tab, base64) and `SPLIT_texts.jsonl`, as they are.

A sample is an image with its texts, those whose `image_ids` hold it, in the order of their file, unprocessed.
What cannot be used, an image or a text, is a sample that cannot be used: the images in their order first,
then the texts. The databases of `lmdb` hold the same and are joined here too.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipcluster.errors import UserError
from clipcluster.text import counted
from tools.convert.readers.open_file import OpenFile
from tools.convert.records import BadRecord, InputFile, Kind, NoOptions, Record, Source, Split

NO_ID = np.iinfo(np.int64).min  # stands in the place of an id that could not be read
_STANDARD = bytes.maketrans(b"-_", b"+/")
_FILE = re.compile(r"(.+)_(imgs\.tsv|texts\.jsonl)")
_IMAGES, _TEXTS = "imgs.tsv", "texts.jsonl"
_ID = re.compile(rb"0|[1-9][0-9]{0,17}")
_BOM = b"\xef\xbb\xbf"
_WANTED = "convert chinese-clip takes a folder with SPLIT_imgs.tsv and SPLIT_texts.jsonl, or such files"


class Images(NamedTuple):
    """`ids` and the bytes of each base64, both (n,) int64; `read(number)` gives the base64 of an image.

    `faults` has key and reason of those that cannot be used, by number; their id is NO_ID.
    """

    ids: np.ndarray
    sizes: np.ndarray
    faults: Mapping[int, tuple[str, str]]
    read: Callable[[int], bytes]


class Texts(NamedTuple):
    """Pairs of a text and an image: `image_ids` (n_pairs,) int64; `read(pair)` gives text_id and text.

    `found` counts the texts that can be used, `without_image` those of them that name no image; `broken` has
    key and reason of the others.
    """

    image_ids: np.ndarray
    found: int
    without_image: int
    broken: Sequence[tuple[str, str]]
    read: Callable[[int], tuple[Any, str]]


def joined(name: str, images: Images, texts: Texts) -> tuple[Split, list[str]]:
    """The split of images with their texts; how much there is and what did not fit, a sentence each."""
    by_image = np.argsort(texts.image_ids, kind="stable")
    image_ids = texts.image_ids[by_image]

    def sizes() -> np.ndarray:
        return np.append(images.sizes * 3 // 4, np.zeros(len(texts.broken), np.int64))

    def read(number: int) -> Record:
        if number >= len(images.ids):
            raise BadRecord(*texts.broken[number - len(images.ids)])
        if number in images.faults:
            raise BadRecord(*images.faults[number])
        image_id = int(images.ids[number])
        image = _decoded(str(image_id), images.read(number))
        start, end = image_ids.searchsorted([image_id, image_id + 1])
        pairs = map(texts.read, by_image[start:end].tolist())
        found = [(text_id, text) for text_id, text in pairs if text.strip()]
        fields = {"id": image_id, "text_ids": [text_id for text_id, _ in found]}
        return Record(str(image_id), image, [text for _, text in found], fields)

    without = int(np.isin(images.ids, image_ids, invert=True).sum()) - len(images.faults)
    unknown = np.flatnonzero(np.isin(texts.image_ids, images.ids, invert=True))
    notes = [
        f"{name}: {len(images.ids):,} images, {without:,} of them without a text; {texts.found:,} texts, "
        f"{texts.without_image:,} of them without an image; {len(image_ids) - len(unknown):,} pairs"
    ]
    if len(unknown):
        notes.append(
            f"{name}: {len(unknown):,} pairs name images that are not there, the first: "
            f"text {texts.read(unknown[0])[0]}, image {texts.image_ids[unknown[0]]}"
        )
    for what, bad in (("image", [*images.faults.values()]), ("text", texts.broken)):
        if bad:
            notes.append(f"{name}: {counted(len(bad), what)} cannot be used; the first: {': '.join(bad[0])}")
    return Split(name, len(images.ids) + len(texts.broken), sizes, read), notes


def _decoded(key: str, text: bytes) -> bytes:
    """The bytes that base64, standard or URL-safe, stands for. BadRecord: it is broken."""
    try:
        return base64.b64decode(text.strip().translate(_STANDARD), validate=True)
    except binascii.Error as error:
        raise BadRecord(key, f"broken base64: {error}") from None


def _images(path: Path) -> Images:
    """The lines of an `_imgs.tsv`: where the base64 of each begins and ends."""
    faults: dict[int, tuple[str, str]] = {}
    ids, offsets, sizes = array("q"), array("q"), array("q")
    for line, offset, text in _lines(path):
        key, tab, rest = text.partition(b"\t")
        usable = tab and _ID.fullmatch(key.strip())
        if not usable:
            faults[len(ids)] = (
                f"line-{line}",
                f"{path.name}, line {line}: expected a number, a tab and base64",
            )
        ids.append(int(key) if usable else NO_ID)
        offsets.append(offset + len(text) - len(rest))
        sizes.append(len(rest))
    numbers = np.array(ids, np.int64)
    first = np.zeros(len(numbers), bool)
    first[np.unique(numbers, return_index=True)[1]] = True
    for number in np.flatnonzero(~first & (numbers != NO_ID)).tolist():
        faults[number] = (str(ids[number]), f"{path.name}: the id also appears on an earlier line")
        numbers[number] = NO_ID
    file = OpenFile(path)
    return Images(numbers, np.array(sizes, np.int64), faults, lambda at: file.read(offsets[at], sizes[at]))


def _texts(path: Path) -> Texts:
    """The lines of a `_texts.jsonl`, and the pairs they make."""
    broken: list[tuple[str, str]] = []
    without_image = 0
    texts, offsets, sizes = array("q"), array("q"), array("q")  # texts: the one of each pair
    image_ids = array("q")
    for line, offset, data in _lines(path):
        try:
            _, _, images = _parsed(data)
        except ValueError as error:
            broken.append((f"text-line-{line}", f"{path.name}, line {line}: {error}"))
            continue
        image_ids.extend(images)
        texts.extend([len(offsets)] * len(images))
        offsets.append(offset)
        sizes.append(len(data))
        without_image += not images
    file = OpenFile(path)

    def read(pair: int) -> tuple[Any, str]:
        text_id, text, _ = _parsed(file.read(offsets[texts[pair]], sizes[texts[pair]]))
        return text_id, text

    return Texts(np.array(image_ids, np.int64), len(offsets), without_image, broken, read)


def _parsed(line: bytes) -> tuple[Any, str, list[int]]:
    """text_id, text and image_ids of a line of `_texts.jsonl`. ValueError saying what is wrong with it."""
    document = json.loads(line.decode())
    if not isinstance(document, dict) or not {"text_id", "text", "image_ids"} <= document.keys():
        raise ValueError("expected an object with text_id, text and image_ids")
    text, images = document["text"], document["image_ids"]
    if not isinstance(text, str) or not isinstance(images, list):
        raise ValueError("text is not a string, or image_ids is not a list")
    if not all(type(image) is int and 0 <= image < 2**63 for image in images):
        raise ValueError("image_ids holds a value that is not an id")
    text.encode()  # half a surrogate pair is a UnicodeEncodeError, and that a ValueError
    return document["text_id"], text, images


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
        none = Texts(np.zeros(0, np.int64), 0, 0, [], lambda pair: (None, ""))
        split, found_in_it = joined(name, _images(images), _texts(texts) if texts else none)
        splits.append(split)
        notes += found_in_it
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
