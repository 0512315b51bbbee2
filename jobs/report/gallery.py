"""The pictures of an evaluation: what `evals/details-….json` says, with the images from the run's shards.

Images are found by shard and key, made small, and put into the page as data URLs, bounded in bytes.
Where the shards are not on this machine, or changed, the page says so and shows the texts alone.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from pydantic import BaseModel, Field, ValidationError

from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.open import open_folder
from clipcluster.data.shards.shard_index import sample_name
from clipcluster.data.shards.tar import BrokenTar, scan
from clipcluster.data.storage.urls import is_remote, redacted
from clipcluster.errors import UserError
from clipcluster.evals.headline import set_names
from clipcluster.runs import files
from clipcluster.runs.folder import Run
from clipcluster.runtime.outcome import DataError

SIDE = 112  # pixels of the longer side of an image in the page
IMAGE_BYTES = 1_200_000  # of all images of a page, as they stand in it
QUALITY = 72
# In the order in which a suite names its sets; the key of an entry that names the set's folder.
KINDS = {"zero_shot": "shards", "retrieval": "shards", "classification": "shards", "probe": "test"}

Place = tuple[str, str]
"""Shard and key of a sample."""
Class = int | str
"""A class by its number, or by its name."""


class Found(BaseModel):
    """A candidate of a query, by its sample; `score` is its cosine."""

    shard: str
    key: str
    caption: str | None = None
    score: float | None
    right: bool


class Query(BaseModel):
    """The sample (image, or caption) that candidates are ranked for."""

    shard: str
    key: str
    caption: str | None = None


class Retrieved(BaseModel):
    """One query; `place`: that of the first right candidate, from 1."""

    query: Query
    place: int
    top: list[Found]


class Retrieval(BaseModel):
    t2i: list[Retrieved] = []
    i2t: list[Retrieved] = []


class ClassFigure(BaseModel):
    """One class: its images, and the fraction of them that are recognised."""

    of: Class = Field(alias="class")
    name: str
    images: int
    top1: float | None


class Confused(BaseModel):
    """So many images of a class are taken for another one."""

    of: Class = Field(alias="class")
    name: str | None = None
    taken_for: Class = Field(alias="as")
    as_name: str | None = None
    images: int


class ConfidentError(BaseModel):
    """An image that is taken for another class with a high score."""

    shard: str
    key: str
    of: Class = Field(alias="class")
    name: str | None = None
    taken_for: Class = Field(alias="as")
    as_name: str | None = None
    score: float | None


class Classes(BaseModel):
    classes: list[ClassFigure] = []
    confused: list[Confused] = []
    confident_errors: list[ConfidentError] = []

    @property
    def worst(self) -> list[ClassFigure]:
        """The classes, the least recognised first, those without a figure last."""
        return sorted(self.classes, key=lambda one: (one.top1 is None, one.top1))

    def name(self, of: Class) -> str:
        """The name of a class."""
        pairs: list[Confused | ConfidentError] = [*self.confused, *self.confident_errors]
        known = [(one.of, one.name) for one in (*self.classes, *pairs)]
        known += [(one.taken_for, one.as_name) for one in pairs]
        return next((name for number, name in known if number == of and name), str(of))


class OfSet(BaseModel):
    """What there is to see of one set."""

    retrieval: Retrieval | None = None
    zero_shot: Classes | None = None
    classification: Classes | None = None


class Details(BaseModel):
    """`evals/details-….json`."""

    step: int
    sets: dict[str, OfSet]


@dataclass
class Gallery:
    """The details of the last evaluation. `images`: data URLs by set and place; `notes`: what is absent."""

    details: Details | None = None
    images: dict[str, dict[Place, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def gallery_of(run: Run, *, image_bytes: int = IMAGE_BYTES) -> Gallery:
    """The gallery of a run, its images in no more than `image_bytes` of the page; empty without details."""
    gallery = Gallery()
    newest = max(run.evals.glob("details-*.json"), key=lambda path: (len(path.name), path.name), default=None)
    if newest is None:
        return gallery
    try:
        gallery.details = Details.model_validate(files.read_json(newest))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        gallery.notes.append(f"{newest.name} is not what this version reads: {where}: {first['msg']}")
        return gallery
    except (files.BrokenFile, OSError) as error:
        gallery.notes.append(f"{newest.name} cannot be read: {error}")
        return gallery
    folders = set_folders(run.settings())
    for name, shown in gallery.details.sets.items():
        gallery.images[name] = {}
        places = _places(shown)
        try:
            dataset = _dataset(folders.get(name), name)
            for place, image in _read(dataset, places):
                made = _data_url(image)
                if len(made) > image_bytes:
                    gallery.notes.append(f"{name}: further images are left out; the page holds no more.")
                    break
                image_bytes -= len(made)
                gallery.images[name][place] = made
        except (UserError, DataError, OSError) as error:
            gallery.notes.append(f"{name}: images are left out: {error}")
    return gallery


def set_folders(settings: Mapping[str, Any]) -> dict[str, str]:
    """The folder of each evaluated set, by the name that its results have."""
    section, paths = settings.get("evaluate") or {}, settings.get("paths") or {}
    sets: list[tuple[str, str | None]] = []
    for kind, key in KINDS.items():
        for number, entry in enumerate(section.get(kind) or ()):
            place = f"evaluate.{kind}.{number}"
            own = entry if isinstance(entry, Mapping) else {}
            folder = paths.get(place) or paths.get(f"{place}.{key}") or own.get(key) or entry
            sets.append((str(folder), own.get("name")))
    names = set_names(folder for folder, _ in sets)
    return {name or names[folder]: folder for folder, name in sets}


def _places(shown: OfSet) -> list[Place]:
    """The images that a set's gallery needs, each once, those that are seen first first."""
    wanted: list[Place] = []
    for one in shown.retrieval.t2i if shown.retrieval else ():
        wanted += [(found.shard, found.key) for found in one.top]
    for one in shown.retrieval.i2t if shown.retrieval else ():
        wanted.append((one.query.shard, one.query.key))
    for classes in (shown.zero_shot, shown.classification):
        wanted += [(error.shard, error.key) for error in (classes.confident_errors if classes else ())]
    return list(dict.fromkeys(wanted))


def _dataset(folder: str | None, name: str) -> Dataset:
    """Raises UserError where there is nothing to read images from without a network."""
    if folder is None:
        raise UserError(f"the run's settings name no folder of the set {name}")
    if is_remote(folder):
        raise UserError(f"{redacted(folder)} is remote")
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder} on this machine")
    return open_folder(folder)


def _read(dataset: Dataset, places: Iterable[Place]) -> Iterable[tuple[Place, bytes]]:
    """The bytes of the images at these places, where the shards have them. Raises DataError and OSError."""
    numbers = {name: number for number, name in enumerate(dataset.shard_names)}
    positions: dict[str, dict[str, int]] = {}
    for shard, key in places:
        if shard in numbers:
            if shard not in positions:
                positions[shard] = dict(_keys(dataset, numbers[shard]))
            if key in positions[shard]:
                yield (shard, key), dataset.read(positions[shard][key], text=False).image


def _keys(dataset: Dataset, shard: int) -> Iterable[tuple[str, int]]:
    """Key and number of every sample of a shard: an index knows where samples are, not their keys."""
    end = int(dataset.sample_ends[shard])
    for position in range(end - int(dataset.sample_counts[shard]), end):
        handle, begin = dataset.begin(position)
        try:
            member = next(scan(handle, begin), None)
        except BrokenTar as error:
            raise DataError(f"shard {dataset.shard_name(shard)}: {error}") from error
        name = sample_name(member.name) if member else None
        if name:
            yield name[0], position


def _data_url(data: bytes) -> str:
    """A small JPEG of an image; empty where Pillow cannot read it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (SIDE, SIDE))
            turned = ImageOps.exif_transpose(image)
            turned = turned.convert("RGBA" if turned.has_transparency_data else "RGB")
            turned.thumbnail((SIDE, SIDE))
            if turned.mode == "RGBA":  # on white, as models see it
                turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned).convert("RGB")
            times = SIDE // max(turned.size)  # the pixels of a tiny image stay squares
            turned = turned.resize((times * turned.width, times * turned.height), Image.Resampling.NEAREST)
            small = io.BytesIO()
            turned.save(small, "JPEG", quality=QUALITY, optimize=True)
    except Exception:  # decoders raise OSError, SyntaxError, struct.error and more
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode()
