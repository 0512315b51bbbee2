"""COCO's images and captions, 2014 and 2017: its zips, read without extracting them, or what is in them.

An image's captions stay together, in the order of the file of annotations, stripped at both ends. Samples go
by image id, which in 12 digits is the key. With `dataset_coco.json` the captions and the splits are
Karpathy's, whose `restval` is training too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipcluster.errors import UserError
from tools.convert.readers.coco_files import WANTED, CocoFiles, DamagedMember, ImageFolder, document
from tools.convert.records import BadRecord, InputFile, Kind, Record, Source, Split, option

_KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


@dataclass(frozen=True)
class Options:
    """What can be chosen about COCO."""

    year: str | None = option(None, "2014 or 2017, where the images of both are there.", metavar="YEAR")
    karpathy: Path | None = option(
        None, "dataset_coco.json: Karpathy's captions and splits instead of COCO's.", metavar="FILE"
    )


class _Listed(NamedTuple):
    """One image as a file of annotations lists it; `fault`: why it cannot be used."""

    id: int
    folder: str
    file: str
    captions: Sequence[str] = ()
    fields: Mapping[str, Any] = {}
    fault: str = ""


def open_coco(inputs: Sequence[Path], options: Options) -> Source:
    """The splits whose images are there. UserError where there are none, or their annotations are missing."""
    found = CocoFiles(inputs)
    year = _year(found, options.year)
    if options.karpathy is None:
        listed, texts, notes = _published(found, year)
    else:
        listed, texts, notes = _karpathy(found, year, options.karpathy), {options.karpathy}, []
    names = [name + year for name in (listed if options.karpathy is None else ("train", "val"))]
    folders = {name: found.images[name] for name in names}
    used = {folder.state for folder in folders.values()} | {InputFile.of(path) for path in texts}
    splits = [_split(name, folders, images) for name, images in listed.items()]
    return Source(splits, sorted(used), [*notes, *_counts(folders, listed)])


def _split(name: str, folders: Mapping[str, ImageFolder], images: Sequence[_Listed]) -> Split:
    """Images by id; among them, as samples that cannot be used, those that captions alone speak of."""
    images = sorted(images, key=lambda image: image.id)

    def sizes() -> np.ndarray:
        found = (0 if at.fault else folders[at.folder].sizes.get(at.file, 0) for at in images)
        return np.fromiter(found, np.int64, len(images))

    def read(number: int) -> Record:
        image = images[number]
        if image.fault:
            raise BadRecord(_key(image.id), image.fault)
        try:
            data = folders[image.folder].read(image.file)
        except (KeyError, FileNotFoundError):
            raise BadRecord(_key(image.id), f"{image.folder}/{image.file} is not there") from None
        except DamagedMember as error:
            raise BadRecord(_key(image.id), f"{image.folder}/{image.file}: {error}") from None
        return Record(_key(image.id), data, image.captions, image.fields)

    return Split(name, len(images), sizes, read)


def _year(found: CocoFiles, chosen: str | None) -> str:
    there = sorted({name[-4:] for name in found.images})
    if chosen is not None and chosen not in there:
        raise UserError(f"--year {chosen}: there are images of {' and '.join(there)} alone")
    if chosen is None and len(there) > 1:
        raise UserError(f"there are images of {' and '.join(there)}: give --year {' or --year '.join(there)}")
    return chosen or there[0]


def _published(found: CocoFiles, year: str) -> tuple[dict[str, list[_Listed]], set[Path], list[str]]:
    """COCO's own splits, the files of annotations they were made from, and what was left out."""
    splits, texts, notes = {}, set(), []
    for name, text, zipped in (
        ("train", f"captions_train{year}.json", f"annotations_trainval{year}.zip"),
        ("val", f"captions_val{year}.json", f"annotations_trainval{year}.zip"),
        ("test", f"image_info_test{year}.json", f"image_info_test{year}.zip"),
    ):
        folder = name + year
        if folder in found.images and text in found.texts:
            path = found.texts[text].path
            splits[name] = _listed(found.text(text), folder, path)
            texts.add(path)
        elif folder in found.images and name != "test":
            raise UserError(
                f"{found.images[folder].state.path}: the images of {folder} are there, {text} is not; give "
                f"{zipped}, or the folder annotations that it holds, too"
            )
        elif folder in found.images:
            notes.append(f"test was left out: its images are there, {text} ({zipped}) is not")
        elif text in found.texts:
            notes.append(f"{name} was left out: {text} is there, the images of {folder} are not")
    if not splits:
        raise UserError(f"{'; '.join(notes)}: nothing to convert; convert coco takes {WANTED}")
    return splits, texts, notes


def _listed(text: Mapping[str, Any], folder: str, path: Path) -> list[_Listed]:
    """The images of a file of annotations, each with its captions. UserError if it is not as COCO's are."""
    captions: dict[int, list[str]] = {}
    listed: dict[int, _Listed] = {}
    again = []
    try:
        for annotation in text.get("annotations", ()):
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
        for image in text["images"]:
            number, file = int(image["id"]), image["file_name"]
            if number in listed:
                again.append(_Listed(number, folder, file, fault=f"{folder}/{file} is listed twice"))
            else:
                texts = tuple(filter(None, captions.get(number, ())))
                listed[number] = _Listed(number, folder, file, texts, image)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: the entries of {folder} are not in COCO's format ({error!r})") from None
    unknown = (
        _Listed(number, folder, "", fault=f"{len(texts)} captions of images that are not listed")
        for number, texts in captions.items()
        if number not in listed
    )
    return [*listed.values(), *again, *unknown]


def _karpathy(found: CocoFiles, year: str, path: Path) -> dict[str, list[_Listed]]:
    """Karpathy's splits, on the images of 2014 or on the same images under 2017's names."""
    if not path.is_file():
        raise UserError(f"--karpathy {path}: no such file; dataset_coco.json is wanted")
    text = document(path.read_bytes(), f"--karpathy {path}")
    folders = (f"train{year}", f"val{year}")
    missing = [name for name in folders if name not in found.images]
    if missing:
        raise UserError(f"Karpathy's splits are cut from {' and '.join(folders)}; {missing[0]} is not there")
    val = found.images[folders[1]].sizes
    splits: dict[str, list[_Listed]] = {}
    try:
        for image in text["images"]:
            if year == "2017":  # the same images, dealt to its train and val in another way
                file = f"{_key(image['cocoid'])}.jpg"
                folder = folders[file in val]
            else:
                file, folder = image["filename"], folders[folders.index(image["filepath"])]
            texts = tuple(filter(None, (sentence["raw"].strip() for sentence in image["sentences"])))
            fields = {"id": image["cocoid"], "imgid": image["imgid"], "split": image["split"]}
            split = splits.setdefault(_KARPATHY_SPLITS[image["split"]], [])
            split.append(_Listed(image["cocoid"], folder, file, texts, {**fields, "file_name": file}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"--karpathy {path} is not the dataset_coco.json that is wanted, but of "
            f"{text.get('dataset', 'something else')} ({error!r})"
        ) from None
    return {name: splits[name] for name in ("train", "val", "test") if name in splits}


def _counts(folders: Mapping[str, ImageFolder], splits: Mapping[str, Sequence[_Listed]]) -> Iterator[str]:
    """How much is listed, and how many files are listed nowhere, a sentence each."""
    unlisted = {name: set(images.sizes) for name, images in folders.items()}
    for name, images in splits.items():
        used = [image for image in images if not image.fault]
        counts = [len(image.captions) for image in used]
        yield (
            f"{name}: {len(used):,} images listed, {counts.count(0):,} of them without a caption; "
            f"{sum(counts):,} captions"
        )
        for image in used:
            unlisted[image.folder].discard(image.file)
    for name, files in unlisted.items():
        if files:
            yield f"{name}: {len(files):,} files ({min(files)}, …) are not listed and were left out"


def _key(number: int) -> str:
    return f"{number:012d}"


KIND = Kind(
    "COCO's images and captions, 2014 or 2017: its zips as they are, or what they hold.",
    open_coco,
    "a folder with COCO's zips or what they hold, or these one by one",
    Options,
)
