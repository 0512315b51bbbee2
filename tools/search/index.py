"""Features of a folder's images, kept in one file for each model, and brought up to date.

    FOLDER/.clipcluster-search/MODEL.npz      features (N, E) float32, and about: JSON in UTF-8 with the files
                                              (name, bytes, mtime_ns), the images of each and the bad ones

MODEL is a hash of the weights and of how images are prepared, so that no model finds another's features. The
file is written aside and renamed. An image is encoded again when its file's size or time has changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import BaseModel, Field

from clipcluster.errors import UserError
from clipcluster.runs.files import write_bytes
from tools.search.images import Bad, File, Place, bytes_at, files_of, images_in

if TYPE_CHECKING:
    from clipcluster.build.loaded import DualEncoderModel

BESIDE = ".clipcluster-search"
FORMAT = 2
SAVE_S = 60.0
"""Seconds after which what was encoded is saved, though more is to come."""
Count = Annotated[int, Field(ge=0)]
_GROUP = 512  # images that are decoded and encoded together


@dataclass(frozen=True)
class ImageIndex:
    """features (N, E) float32 of length one, of the images at `places`; `files` are those looked into."""

    features: np.ndarray
    places: Sequence[Place] = ()
    files: Mapping[str, File] = field(default_factory=dict)
    bad: Sequence[Bad] = ()


def identity_of(model: DualEncoderModel) -> str:
    """A hash over what decides a model's features: structure, weights, and the preparation of images."""
    import torch

    recipe = model.opened.recipe
    # some modules show functions of theirs with the address, which is another one in every process
    structure = re.sub(r" at 0x[0-9a-f]+", "", repr(model.model))
    about = [structure, recipe.model.model_dump_json(), recipe.data.image.model_dump_json()]
    digest = hashlib.sha256("\n".join(about).encode())
    for name, value in sorted(model.model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def index_file(folder: Path, identity: str, elsewhere: Path | None) -> Path:
    """Where the index of a folder for a model is: beside the images, or in a folder for those of any.

    UserError where it cannot be written there.
    """
    name = identity[:16]
    if elsewhere is not None:
        name += f"-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]}"
    place = elsewhere if elsewhere is not None else folder / BESIDE
    try:
        place.mkdir(parents=True, exist_ok=True)
        writable = os.access(place, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"The index cannot be written to {place}; name a writable folder with --index.")
    return place / f"{name}.npz"


class _About(BaseModel):
    """What the file says of its features. images: the number of the file, key, offset and bytes."""

    format: int
    model: str
    files: list[tuple[str, Count, int]]
    images: list[tuple[Count, str, Count, Count]]
    bad: list[tuple[str, str, str]]


def read_index(file: Path, identity: str, width: int) -> ImageIndex | None:
    """The index in a file, of features (N, width); None where there is none.

    ValueError where it cannot be read, is damaged, or another model's: others may write beside the images.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            features, text = stored["features"], stored["about"].tobytes()
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy and zipfile raise BadZipFile, zlib.error, struct.error, MemoryError, …
        raise ValueError(f"it cannot be read ({type(error).__name__}: {error})") from None
    try:
        about = _About.model_validate(json.loads(text))
    except (ValueError, RecursionError) as error:  # pydantic's is one
        raise ValueError(f"it is damaged ({' '.join(str(error).split()):.200})") from None
    if (about.format, about.model) != (FORMAT, identity):
        raise ValueError("it was made for another model or version")
    if features.dtype != np.float32 or features.shape != (len(about.images), width):
        raise ValueError(f"it is damaged ({features.shape} features of {len(about.images)} images)")
    files = [File(*own) for own in about.files]
    if not all(at < len(files) and offset + size <= files[at].size for at, _, offset, size in about.images):
        raise ValueError("it is damaged (an image that is in no file)")
    places = [Place(files[at].name, key, offset, size) for at, key, offset, size in about.images]
    return ImageIndex(features, places, {own.name: own for own in files}, [Bad(*own) for own in about.bad])


def write_index(file: Path, index: ImageIndex, identity: str) -> None:
    """Replace the file in one step. OSError leaves the old one."""
    number = {name: at for at, name in enumerate(index.files)}
    about = {
        "format": FORMAT,
        "model": identity,
        "files": [list(own) for own in index.files.values()],
        "images": [[number[place.file], *place[1:]] for place in index.places],
        "bad": [list(bad) for bad in index.bad if bad.file in number],
    }
    content = io.BytesIO()
    text = json.dumps(about, separators=(",", ":")).encode()
    np.savez(content, features=index.features, about=np.frombuffer(text, np.uint8))
    write_bytes(file, content.getvalue())


def up_to_date(
    folder: Path,
    model: DualEncoderModel,
    file: Path,
    identity: str,
    *,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ImageIndex, int]:
    """The index of a folder as it is now, also written to `file`, and how many images were encoded for it.

    identity: the model's. A file that cannot be read now is reported as bad and tried again the next time.
    `progress(done, total)` counts files. Raises OSError where the index cannot be written.
    """
    try:
        known = read_index(file, identity, model.embed_dim)
    except ValueError as error:
        say(f"the index {file} is not used: {error}; all images are encoded again")
        known = None
    known = known or ImageIndex(np.empty((0, model.embed_dim), np.float32))
    listed, refused = files_of(folder)
    now = {own.name: own for own in listed}
    kept = {name for name, own in now.items() if known.files.get(name) == own}
    todo = [own for name, own in now.items() if name not in kept]
    parts = [_of_files(known, kept)]
    encoded, done, saved = 0, 0, time.monotonic()
    for group in _groups(folder, todo):
        parts.append(_encoded(folder, model, group))
        encoded, done = encoded + len(parts[-1].places), done + group.looked_into
        if progress is not None:
            progress(done, len(todo))
        if time.monotonic() - saved > SAVE_S:
            parts, saved = [_joined(parts)], time.monotonic()
            write_index(file, parts[0], identity)
    index = _joined([*parts, ImageIndex(known.features[:0], bad=refused)])
    if index.files != known.files:
        write_index(file, index, identity)
    return index, encoded


def _of_files(index: ImageIndex, names: Collection[str]) -> ImageIndex:
    """What the index has of these files."""
    rows = [at for at, place in enumerate(index.places) if place.file in names]
    return ImageIndex(
        index.features[rows],
        [index.places[at] for at in rows],
        {name: own for name, own in index.files.items() if name in names},
        [bad for bad in index.bad if bad.file in names],
    )


def _joined(parts: Sequence[ImageIndex]) -> ImageIndex:
    """Several indexes of different files as one, by file and place."""
    places = [place for part in parts for place in part.places]
    order = sorted(range(len(places)), key=lambda at: (places[at].file, places[at].offset))
    return ImageIndex(
        np.concatenate([part.features for part in parts])[order],
        [places[at] for at in order],
        {name: own for part in parts for name, own in part.files.items()},
        sorted(bad for part in parts for bad in part.bad),
    )


@dataclass
class _Group:
    """Images that are encoded together, from `looked_into` files, of which `files` could be read."""

    files: dict[str, File] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    looked_into: int = 0


def _groups(folder: Path, files: Iterable[File]) -> Iterator[_Group]:
    group = _Group()
    for own in files:
        try:
            places, bad = images_in(folder, own.name)
            group.files[own.name] = own
        except OSError as error:
            places, bad = [], [Bad(own.name, "", f"cannot be read: {error.strerror or error}")]
        group.places += places
        group.bad += bad
        group.looked_into += 1
        if len(group.places) >= _GROUP:
            yield group
            group = _Group()
    if group.looked_into:
        yield group


def _encoded(folder: Path, model: DualEncoderModel, group: _Group) -> ImageIndex:
    """The index of a group's files; what cannot be decoded is bad, what cannot be read is left for later."""
    import torch
    from torch import Tensor

    from clipcluster.build.loaded import BATCH, cut
    from clipcluster.data.images.decode import BadImage
    from clipcluster.runtime.devices import usable_cores

    def prepared(place: Place) -> Tensor | Exception:
        try:
            return model.transform(bytes_at(folder, place))
        except (BadImage, OSError) as error:
            return error

    features = [np.empty((0, model.embed_dim), np.float32)]
    places: list[Place] = []
    bad, unread = list(group.bad), set()
    with ThreadPoolExecutor(usable_cores(1)) as threads:
        for batch in cut(group.places, BATCH):
            made = list(zip(batch, threads.map(prepared, batch), strict=True))
            good = [(place, pixels) for place, pixels in made if isinstance(pixels, Tensor)]
            if good:
                pixels = torch.stack([pixels for _, pixels in good])
                features.append(model.encode_image(pixels).cpu().numpy())
                places += [place for place, _ in good]
            bad += [
                Bad(place.file, place.key, str(error))
                for place, error in made
                if isinstance(error, Exception)
            ]
            unread |= {place.file for place, error in made if isinstance(error, OSError)}
    whole = ImageIndex(np.concatenate(features), places, group.files, bad)
    if not unread:
        return whole
    read = _of_files(whole, set(group.files) - unread)
    return replace(read, bad=bad)
