"""Shards into other shards: some of their samples, several folders together, cut anew.

A sample goes over as it is: all its members, byte for byte, in their order. Which samples are taken is
decided once, from the indexes and where needed from the images' headers or hashes, before anything is
written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipcluster.data.images.format import KIND_NAMES, kind_of, size_of
from clipcluster.data.shards import indexing, shard_index, shard_list
from clipcluster.data.shards.captions import choice_for
from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.open import open_folder
from clipcluster.data.shards.tar import NO_BYTES, read_at, scan
from clipcluster.data.shards.texts import BESIDE_SHARDS, CLASS_NAMES
from clipcluster.errors import UserError
from clipcluster.runtime.outcome import DataError
from tools.convert.records import BadRecord, InputFile, Kind, Source, WholeRecord, option

_HEADER = 128 << 10  # bytes of an image in which its size usually stands


@dataclass(frozen=True)
class Options:
    """Which samples are taken; conditions are applied in this order."""

    samples: Path | None = option(None, "Take the keys of this file, one a line.", metavar="FILE")
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


class _Folder:
    """One folder of shards: where its samples lie, and what the index knows of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shards: Dataset = open_folder(path, None, choice_for(path, None))
        self.shards.check_unchanged()
        self.summary = shard_list.read_summary(path)

    def keys(self, positions: np.ndarray) -> Iterator[str]:
        """The keys of these samples (ascending), by their headers alone."""
        for position in positions.tolist():
            name = shard_index.sample_name(next(scan(*self.shards.begin(position))).name)
            assert name is not None, "the index begins a sample with a member of one"
            yield name[0]


def _told(error: DataError) -> UserError:
    """What is wrong with shards or their index, for people."""
    return UserError(f"{error.reason}; {error.advice}" if error.advice else error.reason)


class Resharding:
    """The samples taken of several folders, in their order: a `tools.convert.records.Split`."""

    name = ""

    def __init__(
        self,
        folders: Sequence[_Folder],
        taken: Sequence[np.ndarray],
        files: Mapping[str, str],
        options: Options,
    ) -> None:
        self.files = files
        self._folders = folders
        self._taken = taken
        self._ends = np.cumsum([len(positions) for positions in taken])
        self._options = options

    def __len__(self) -> int:
        return int(self._ends[-1])

    def sizes(self) -> np.ndarray:
        """Bytes of each image, (n,) int64."""
        pieces = []
        for folder, taken in zip(self._folders, self._taken, strict=True):
            every = [folder.shards.columns(shard)["image_size"] for shard in range(len(folder.shards))]
            pieces.append(np.concatenate(every)[taken])
        return np.concatenate(pieces)

    def read(self, number: int) -> WholeRecord:
        """One sample as it lies in its tar. BadRecord: with `drop_bad`, an image that cannot be decoded."""
        part = int(np.searchsorted(self._ends, number, side="right"))
        position = int(self._taken[part][number - int(self._ends[part]) + len(self._taken[part])])
        folder = self._folders[part]
        try:
            fd, start = folder.shards.begin(position)
        except DataError as error:
            raise _told(error) from None
        key, found = next(shard_index.samples(fd, start))
        members = {
            member.name[len(key) + 1 :]: read_at(fd, member.offset, member.size)
            for member in found.values()
            if member.size != NO_BYTES
        }
        key = f"{folder.path.resolve().name}/{key}" if self._options.prefix else key
        if self._options.drop_bad:
            _require_decodable(key, members)
        return WholeRecord(key, members)


def _require_decodable(key: str, members: Mapping[str, bytes]) -> None:
    from clipcluster.data.images.decode import BadImage, decode  # loads torch, for those who ask for it

    image = next(data for name, data in members.items() if name.lower() in shard_index.IMAGE_EXTENSIONS)
    try:
        decode(image)
    except BadImage as error:
        raise BadRecord(key, str(error)) from None


def _open(inputs: Sequence[Path], options: Options) -> Source:
    _require_sense(options)
    try:
        return _chosen(inputs, options)
    except DataError as error:
        raise _told(error) from None


def _chosen(inputs: Sequence[Path], options: Options) -> Source:
    folders = [_Folder(path) for path in dict.fromkeys(inputs)]
    files, notes = _files(folders)
    for folder in folders:
        notes += _left_behind(folder)
    taken = _taken(folders, options)
    if not any(map(len, taken)):
        raise UserError("reshard: no sample meets these conditions; nothing to write")
    tars = [
        InputFile.of(folder.shards.shard_path(shard))
        for folder in folders
        for shard in range(len(folder.shards))
    ]
    lists = [InputFile.of(options.samples)] if options.samples else []
    return Source([Resharding(folders, taken, files, options)], [*tars, *lists], notes)


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


def _left_behind(folder: _Folder) -> list[str]:
    """What is no sample for the index and so does not go over, in words."""
    notes, found = [], folder.summary
    if found.without_image or found.duplicates:
        notes.append(
            f"{folder.path}: left behind: {found.without_image} without an image, {found.duplicates} whose "
            "key came before in their shard"
        )
    notes += [
        f"{folder.path}: {one['shard']} is broken: {one['reason']}; the samples before that point are taken"
        for one in found.broken
    ]
    return notes


def _files(folders: Sequence[_Folder]) -> tuple[dict[str, str], list[str]]:
    """The files beside the shards that all folders agree on. UserError: class names that differ."""
    files: dict[str, str] = {}
    notes: list[str] = []
    for name in BESIDE_SHARDS:
        texts = [_text_beside(folder.path, name) for folder in folders]
        if None not in texts and len(set(texts)) == 1:
            files[name] = texts[0] or ""
        elif len({text for text in texts if text is not None}) > 1 and name == CLASS_NAMES:
            raise UserError(
                f"{' and '.join(str(folder.path) for folder in folders)} have other class names: the same "
                "number would mean two things; reshard them one by one"
            )
        elif any(text is not None for text in texts):
            notes.append(f"{name} is not the same in all folders, and left out")
    return files, notes


def _text_beside(folder: Path, name: str) -> str | None:
    for path in (folder / name, folder.parent / name):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def _taken(folders: Sequence[_Folder], options: Options) -> list[np.ndarray]:
    """The positions taken of each folder, ascending int64."""
    taken = [np.arange(folder.shards.n_samples) for folder in folders]
    if options.has_caption:
        taken = [at[f.shards.caption_counts(at) > 0] for f, at in zip(folders, taken, strict=True)]
    if options.classes:
        taken = [
            at[np.isin(np.asarray(f.shards.classes)[at], options.classes)]
            for f, at in zip(folders, taken, strict=True)
        ]
    if options.samples is not None:
        taken = _with_keys(folders, taken, options.samples)
    for condition in _conditions(options):
        taken = [
            np.array([p for p in at.tolist() if condition(folder.shards, p)], np.int64)
            for folder, at in zip(folders, taken, strict=True)
        ]
    if options.fraction is not None:
        taken = _share(folders, taken, options.fraction, options.seed)
    if options.first is not None:
        left = options.first
        for number, at in enumerate(taken):
            taken[number], left = at[:left], max(0, left - len(at))
    return taken


def _with_keys(folders: Sequence[_Folder], taken: Sequence[np.ndarray], file: Path) -> list[np.ndarray]:
    """Those whose key is a line of the file. UserError: no such file, a key that is nowhere."""
    try:
        wanted = {line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--samples {file}: cannot be read ({error}); give a text file with one key a line"
        ) from None
    found: set[str] = set()
    kept = []
    for folder, at in zip(folders, taken, strict=True):
        keys = list(folder.keys(at))
        found |= wanted.intersection(keys)
        kept.append(at[np.array([key in wanted for key in keys], bool)])
    missing = sorted(wanted - found)
    if missing:
        raise UserError(
            f"--samples {file}: {len(missing)} of its {len(wanted)} keys are in no shard ({missing[0]}, …); "
            "take them out of the file, or give the folders that hold them"
        )
    return kept


def _conditions(options: Options) -> list[Callable[[Dataset, int], bool]]:
    """What the images' bytes have to answer."""
    conditions: list[Callable[[Dataset, int], bool]] = []
    if options.kinds or options.min_side is not None or options.max_aspect is not None:
        names = _kinds_named(options)

        def fits(shards: Dataset, position: int) -> bool:
            image = shards.read(position, text=False).image
            if names and (kind_of(image) or "none").lower() not in names:
                return False
            if options.min_side is None and options.max_aspect is None:
                return True
            sides = sorted(size_of(image[:_HEADER]) or size_of(image) or (0, 0))
            if not sides[0] or sides[0] < (options.min_side or 0):
                return False
            return options.max_aspect is None or sides[1] <= options.max_aspect * sides[0]

        conditions.append(fits)
    if options.dedupe:
        seen: set[bytes] = set()

        def is_new(shards: Dataset, position: int) -> bool:
            digest = hashlib.sha256(shards.read(position, text=False).image).digest()[:16]
            new = digest not in seen
            seen.add(digest)
            return new

        conditions.append(is_new)
    return conditions


def _share(
    folders: Sequence[_Folder], taken: Sequence[np.ndarray], fraction: float, seed: int
) -> list[np.ndarray]:
    """A share of the samples by a hash of seed and key, whatever shard they lie in."""
    hashes = [
        np.array([_hash(seed, key) for key in folder.keys(at)], np.uint64)
        for folder, at in zip(folders, taken, strict=True)
    ]
    every = np.concatenate(hashes)
    count = round(fraction * len(every))
    mask = np.zeros(len(every), bool)
    mask[np.argsort(every, kind="stable")[:count]] = True
    masks = np.split(mask, np.cumsum([len(at) for at in taken])[:-1])
    return [at[chosen] for at, chosen in zip(taken, masks, strict=True)]


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
