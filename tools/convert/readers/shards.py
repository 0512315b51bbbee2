"""Shards into other shards: some of their samples, several folders together, cut anew.

A sample goes over as it is: all its members, byte for byte, in their order. Which samples are taken is
decided once, from the indexes and where needed from the images' headers or hashes, before anything is
written.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipcluster.data.images.format import KIND_NAMES, kind_of, size_of
from clipcluster.data.shards import indexing, shard_index, shard_list
from clipcluster.data.shards.captions import BESIDE_SHARDS, CLASS_NAMES, choice_for
from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.folder_index import IndexedFolder
from clipcluster.data.shards.tar import NO_BYTES, read_at, scan
from clipcluster.errors import UserError
from clipcluster.runtime.outcome import DataError
from tools.convert.readers.sample_choice import first_of_each
from tools.convert.records import BadRecord, InputFile, Kind, Source, Split, WholeRecord, option

_HEADER = 128 << 10  # bytes of an image in which its size usually stands


@dataclass(frozen=True)
class Options:
    """Which samples are taken; conditions are applied in this order."""

    samples: Path | None = option(None, "Take the keys of this file, one per line.", metavar="FILE")
    has_caption: bool = option(False, "Take samples with a caption.")
    classes: tuple[int, ...] = option(
        (), "Take samples of this class; repeatable.", metavar="NUMBER", flag="--class"
    )
    kinds: tuple[str, ...] = option((), "Take images of this kind by content, as JPEG,PNG.", metavar="KIND")
    min_side: int | None = option(None, "Take images with no shorter side.", metavar="PIXELS")
    max_aspect: float | None = option(None, "Take images whose sides have no larger ratio.", metavar="RATIO")
    dedupe: bool = option(False, "Of samples with the same image bytes take the first.")
    fraction: float | None = option(
        None, "Take this fraction, drawn by a hash of --seed and key.", metavar="F"
    )
    seed: int = option(0, "The seed of --fraction.", metavar="N")
    first: int | None = option(None, "Take the first N of what is left.", metavar="N")
    drop_bad: bool = option(False, "Decode every image; leave out and list those that cannot be.")
    prefix: bool = option(False, "Put the folder's name before each key, FOLDER/KEY.")


def _keys(dataset: Dataset, positions: np.ndarray) -> list[str]:
    """The keys of these samples (ascending), by their headers alone."""
    keys = []
    for position in positions.tolist():
        name = shard_index.sample_name(next(scan(*dataset.begin(position))).name)
        assert name is not None, "the index begins a sample with a member of one"
        keys.append(name[0])
    return keys


def _split(dataset: Dataset, taken: np.ndarray, files: Mapping[str, str], options: Options) -> Split:
    """The samples taken, as they lie in their tars."""

    def sizes() -> np.ndarray:
        every = [dataset.columns(shard)["image_size"] for shard in range(len(dataset))]
        return np.asarray(np.concatenate(every)[taken])

    def read(number: int) -> WholeRecord:
        position = int(taken[number])
        with _told():
            fd, start = dataset.begin(position)
        key, found = next(shard_index.samples(fd, start))
        members = {
            member.name[len(key) + 1 :]: read_at(fd, member.offset, member.size)
            for member in found.values()
            if member.size != NO_BYTES
        }
        if options.prefix:
            folder = dataset.shard_path(dataset.locate(position)[0]).parent
            key = f"{folder.resolve().name}/{key}"
        if options.drop_bad:
            _require_decodable(key, members)
        return WholeRecord(key, members)

    return Split("", len(taken), sizes, read, files)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What is wrong with shards or their index becomes a UserError."""
    try:
        yield
    except DataError as error:
        raise UserError(f"{error.reason}; {error.advice}" if error.advice else error.reason) from None


def _require_decodable(key: str, members: Mapping[str, bytes]) -> None:
    from clipcluster.data.images.decode import BadImage, decode  # loads torch, for those who ask for it

    image = next(data for name, data in members.items() if name.lower() in shard_index.IMAGE_EXTENSIONS)
    try:
        decode(image)
    except BadImage as error:
        raise BadRecord(key, str(error)) from None


def _open(inputs: Sequence[Path], options: Options) -> Source:
    _require_sense(options)
    folders = list(dict.fromkeys(inputs))
    with _told():
        dataset = Dataset([IndexedFolder(path, path, (choice_for(path, None),)) for path in folders])
        dataset.check_unchanged()
        files, notes = _files(folders)
        notes += [note for path in folders for note in _left_behind(path)]
        taken = _taken(dataset, options)
    if not len(taken):
        raise UserError("reshard: no sample meets these conditions; nothing to write")
    read = [dataset.shard_path(shard) for shard in range(len(dataset))]
    read += [options.samples] if options.samples else []
    return Source([_split(dataset, taken, files, options)], [InputFile.of(path) for path in read], notes)


def _kinds_named(options: Options) -> set[str]:
    return {name.strip().lower() for part in options.kinds for name in part.split(",")}


def _require_sense(options: Options) -> None:
    """UserError for values that mean nothing."""
    if options.fraction is not None and not 0 < options.fraction <= 1:
        raise UserError(f"--fraction {options.fraction}: give a fraction above 0 and up to 1, such as 0.1")
    for name in ("first", "min_side"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    for name in _kinds_named(options):
        if name not in (*map(str.lower, KIND_NAMES), "none"):
            raise UserError(f"--kinds {','.join(options.kinds)}: there are {', '.join(KIND_NAMES)}, and none")
    if options.max_aspect is not None and not options.max_aspect >= 1:
        raise UserError(
            f"--max-aspect {options.max_aspect}: the ratio of the longer side to the shorter is 1 or more"
        )


def _left_behind(folder: Path) -> list[str]:
    """What is no sample for the index and so does not go over, in words."""
    notes, found = [], shard_list.read_summary(folder)
    if found.without_image or found.duplicates:
        notes.append(
            f"{folder}: left behind: {found.without_image} without an image, {found.duplicates} whose "
            "key came before in their shard"
        )
    notes += [
        f"{folder}: {one['shard']} is broken: {one['reason']}; the samples before that point are taken"
        for one in found.broken
    ]
    return notes


def _files(folders: Sequence[Path]) -> tuple[dict[str, str], list[str]]:
    """The files beside the shards that all folders agree on. UserError: class names that differ."""
    files: dict[str, str] = {}
    notes: list[str] = []
    for name in BESIDE_SHARDS:
        texts = {_text_beside(folder, name) for folder in folders}
        if len(texts - {None}) > 1 and name == CLASS_NAMES:
            raise UserError(
                f"{' and '.join(map(str, folders))} have other class names: the same number would mean two "
                "things; reshard them one by one"
            )
        text = texts.pop()
        if texts:
            notes.append(f"{name} is not the same in all folders, and left out")
        elif text is not None:
            files[name] = text
    return files, notes


def _text_beside(folder: Path, name: str) -> str | None:
    for path in (folder / name, folder.parent / name):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def _taken(dataset: Dataset, options: Options) -> np.ndarray:
    """The positions of the samples taken, ascending int64."""
    taken = np.arange(dataset.n_samples)
    if options.has_caption:
        taken = taken[dataset.caption_counts(taken) > 0]
    if options.classes:
        taken = taken[np.isin(dataset.classes[taken], options.classes)]
    if options.samples is not None:
        taken = _with_keys(dataset, taken, options.samples)
    conditions = (_kinds_named(options), options.min_side, options.max_aspect)
    if any(conditions):
        fits = (_fits(image, *conditions) for image in _images(dataset, taken))
        taken = taken[np.fromiter(fits, bool, len(taken))]
    if options.dedupe:
        digests = [hashlib.sha256(image).digest()[:16] for image in _images(dataset, taken)]
        taken = taken[first_of_each(np.array(digests, "S16"))]
    if options.fraction is not None:
        hashes = np.array([_hash(options.seed, key) for key in _keys(dataset, taken)], np.uint64)
        lowest = np.argsort(hashes, kind="stable")[: round(options.fraction * len(hashes))]
        taken = taken[np.sort(lowest)]
    return taken[: options.first]


def _with_keys(dataset: Dataset, taken: np.ndarray, file: Path) -> np.ndarray:
    """Those whose key is a line of the file. UserError: no such file, a key that is nowhere."""
    try:
        wanted = {line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--samples {file}: cannot be read ({error}); give a text file with one key a line"
        ) from None
    keys = _keys(dataset, taken)
    missing = sorted(wanted.difference(keys))
    if missing:
        raise UserError(
            f"--samples {file}: {len(missing)} of its {len(wanted)} keys are in no shard ({missing[0]}, …); "
            "take them out of the file, or give the folders that hold them"
        )
    return taken[np.array([key in wanted for key in keys], bool)]


def _images(dataset: Dataset, positions: np.ndarray) -> Iterator[bytes]:
    return (dataset.read(position, text=False).image for position in positions.tolist())


def _fits(image: bytes, names: Collection[str], min_side: int | None, max_aspect: float | None) -> bool:
    """Whether an image is of one of these kinds, if any are named, and of such a size."""
    if names and (kind_of(image) or "none").lower() not in names:
        return False
    if min_side is None and max_aspect is None:
        return True
    shorter, longer = sorted(size_of(image[:_HEADER]) or size_of(image) or (0, 0))
    return shorter >= (min_side or 1) and (max_aspect is None or longer <= max_aspect * shorter)


def _hash(seed: int, key: str) -> int:
    data = f"{seed} ".encode() + key.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def index_as_before(inputs: Sequence[Path], out: Path) -> None:
    """Counts in the new shards the choices of captions that the indexes of the old ones have."""
    choices = dict.fromkeys(choice for path in inputs for choice in shard_list.read_summary(path).choices)
    if not set(choices) <= set(shard_list.read_summary(out).choices):
        indexing.index_folder(out, None, list(choices))


KIND = Kind(
    help="Shards into other shards: a subset, a filter, several together, another size (see reshard).",
    open=_open,
    inputs="Indexed folders of shards.",
    options=Options,
)
