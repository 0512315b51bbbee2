"""Images and texts that are listed apart, as Chinese-CLIP does, joined by the images' ids.

A sample is an image with its texts. What cannot be used, an image or a text, is a sample that cannot be used:
the images in their order first, then the texts.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from tools.convert.records import BadRecord, Record

NO_ID = np.iinfo(np.int64).min  # stands in the place of an id that could not be read
_STANDARD = bytes.maketrans(b"-_", b"+/")


class Images(Protocol):
    """`ids` (n,) int64; `faults` has key and reason of those that cannot be used, whose id is NO_ID."""

    ids: np.ndarray
    faults: dict[int, tuple[str, str]]

    def sizes(self) -> np.ndarray:
        """Bytes of each image's base64, (n,) int64."""
        ...

    def read(self, number: int) -> bytes:
        """The base64 of an image."""
        ...


class Texts(Protocol):
    """`image_ids` (n_pairs,) int64, one for every image of a text; `broken` has key and reason."""

    count: int
    without_image: int
    image_ids: np.ndarray
    broken: list[tuple[str, str]]

    def read(self, pair: int) -> tuple[Any, str]:
        """text_id and text of a pair."""
        ...


class Join(NamedTuple):
    """`order` (n_known,): the pairs whose image is there, by image, and as listed for one image; those of
    image i end at `ends[i]`, (n_images,). `unknown`: the pairs whose image is not there."""

    order: np.ndarray
    ends: np.ndarray
    unknown: np.ndarray

    def pairs(self, image: int) -> list[int]:
        """The pairs of an image."""
        start = self.ends[image - 1] if image else 0
        return [int(pair) for pair in self.order[start : self.ends[image]]]


def join(images: np.ndarray, pairs: np.ndarray) -> Join:
    """Joins ids of images, each once, (n_images,) int64, with the image ids of pairs, (n_pairs,) int64."""
    by_id = np.argsort(images, kind="stable")
    place = np.searchsorted(images, pairs, sorter=by_id)
    inside = np.flatnonzero(place < len(images))
    number = np.full(len(pairs), -1)
    number[inside] = by_id[place[inside]]
    number[inside[images[number[inside]] != pairs[inside]]] = -1
    known = np.flatnonzero(number >= 0)
    order = known[np.argsort(number[known], kind="stable")]
    ends = np.cumsum(np.bincount(number[known], minlength=len(images)))
    return Join(order, ends, np.flatnonzero(number < 0))


def repeated(ids: np.ndarray) -> list[int]:
    """The places of ids that stood before, (n,) int64; NO_ID may stand anywhere."""
    by_id = np.argsort(ids, kind="stable")
    again = (ids[by_id][1:] == ids[by_id][:-1]) & (ids[by_id][1:] != NO_ID)
    return sorted(by_id[1:][again].tolist())


class JoinedSplit:
    """A split of images with their texts."""

    def __init__(self, name: str, images: Images, texts: Texts) -> None:
        self.name = name
        self.files: Mapping[str, str] = {}
        self._images, self._texts = images, texts
        self._join = join(images.ids, texts.image_ids)

    def __len__(self) -> int:
        return len(self._images.ids) + len(self._texts.broken)

    def sizes(self) -> np.ndarray:
        return np.append(self._images.sizes() * 3 // 4, np.zeros(len(self._texts.broken), np.int64))

    def read(self, number: int) -> Record:
        if number >= len(self._images.ids):
            raise BadRecord(*self._texts.broken[number - len(self._images.ids)])
        if number in self._images.faults:
            raise BadRecord(*self._images.faults[number])
        image_id = int(self._images.ids[number])
        image = _image(str(image_id), self._images.read(number))
        pairs = [self._texts.read(pair) for pair in self._join.pairs(number)]
        texts = [(text_id, text) for text_id, text in pairs if text.strip()]
        fields = {"id": image_id, "text_ids": [text_id for text_id, _ in texts]}
        return Record(str(image_id), image, [text for _, text in texts], fields)

    def notes(self) -> Iterator[str]:
        """How much there is, and what did not fit, a sentence each."""
        images, texts = self._images, self._texts
        counts = np.diff(self._join.ends, prepend=0)
        without = int((counts == 0).sum()) - len(images.faults)
        yield (
            f"{self.name}: {len(images.ids):,} images, {without:,} of them without a text; {texts.count:,} "
            f"texts, {texts.without_image:,} of them without an image; {len(self._join.order):,} pairs"
        )
        if len(self._join.unknown):
            pair = int(self._join.unknown[0])
            yield (
                f"{self.name}: {len(self._join.unknown):,} pairs name images that are not there, the first: "
                f"text {texts.read(pair)[0]}, image {texts.image_ids[pair]}"
            )
        for what, bad in (("images", [*images.faults.values()]), ("texts", texts.broken)):
            if bad:
                yield f"{self.name}: {len(bad):,} {what} cannot be used; the first: {': '.join(bad[0])}"


def _image(key: str, text: bytes) -> bytes:
    """The bytes that base64, standard or URL-safe, stands for. BadRecord: it is broken."""
    try:
        return base64.b64decode(text.strip().translate(_STANDARD), validate=True)
    except binascii.Error as error:
        raise BadRecord(key, f"broken base64: {error}") from None
