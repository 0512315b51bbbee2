"""A recipe's shards as a `webdataset.WebDataset`, decoded as in training, for anybody's own loop.

Which shards come, to whom and in what order is webdataset's; how a shard is reached and read is ours. No
other module loads webdataset.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import webdataset as wds
from webdataset.compat import check_empty

from clipcluster.data.images.decode import BadImage, decode
from clipcluster.data.shards import captions, shard_index
from clipcluster.data.shards.columns import BrokenColumns
from clipcluster.data.shards.dataset import Dataset, Sample, read_members, read_row
from clipcluster.data.shards.find import find_shards
from clipcluster.data.shards.folder_index import COLUMNS_FILE
from clipcluster.data.shards.open import folders_here, open_folder
from clipcluster.data.shards.opened import OpenShard
from clipcluster.data.shards.tar import BrokenTar
from clipcluster.data.storage.cache import Cache, default_folder
from clipcluster.data.storage.download import read_beside
from clipcluster.data.storage.urls import (
    Forbidden,
    RemoteFile,
    RemoteFolder,
    chosen,
    is_remote,
    named,
    tars_of,
)
from clipcluster.errors import UserError
from clipcluster.recipe.captions import DEFAULT, LINES, probabilities_of
from clipcluster.runtime.outcome import DataError

_REPLACED = ("cache_dir", "cache_size", "url_to_name", "select_files", "rename_files", "verbose")
"""Arguments of the stages that are replaced here."""


def webdataset(
    shards: str | Path | Sequence[str | Path],
    *,
    index: str | Path | None = None,
    captions_in: str | Mapping[str, float] | None = None,
    members: Collection[str] = (),
    cache: str | Path | None = None,
    **arguments: Any,
) -> wds.WebDataset:
    """The samples of a source of a recipe, as webdataset hands them out.

    A sample is a dict: `__key__`, `__url__` (its shard), `image` (3, H, W) uint8, `captions` (a list of all
    of them), `cls` (-1: none), and the bytes of further `members` by extension (`json`) where it has them.

    shards, index, captions_in: as of a source in a recipe, but that shards need no index: one without is
    scanned when it is opened. cache: folder for remote shards; default $CLIPCLUSTER_CACHE, else
    ~/.cache/clipcluster. arguments: webdataset's own (`resampled`, `shardshuffle`, `seed`, `nodesplitter`,
    `workersplitter`, `handler`, `empty_check`); shards are dealt to ranks and loader workers and not shuffled
    unless they say so.

    A sample that cannot be decoded, and a shard that cannot be read, raise as in `Dataset.read`, or do what
    `handler` says. Raises UserError where no shards are found, or an index has other captions; TypeError for
    an argument of webdataset's that has no effect here.
    """
    idle = [name for name in _REPLACED if name in arguments]
    if idle:
        raise TypeError(f"{', '.join(idle)}: no effect here; remote shards are kept in `cache`")
    written = [str(shards)] if isinstance(shards, str | Path) else [str(entry) for entry in shards]
    kept = Cache(str(cache) if cache is not None else default_folder())
    readers = [reader for entry in written for reader in _readers(entry, index, captions_in, kept)]
    places = tuple(_Place(reader, number) for reader in readers for number in range(len(reader)))
    if not places:
        raise UserError("webdataset: there are no shards; name a folder of tars, or tars.")
    empty_check = arguments.pop("empty_check", True)
    stream = wds.WebDataset(
        [str(number) for number in range(len(places))],
        **{"shardshuffle": False, "nodesplitter": wds.split_by_node, **arguments},
        empty_check=False,
    )
    opener = stream.pipeline[-3]  # the last stages open a shard, read its members, and group them
    if type(opener).__module__ != "webdataset.cache":
        raise RuntimeError(f"webdataset {wds.__version__} has other stages than those known here; use 1.0.2")
    handler = arguments.get("handler", wds.reraise_exception)
    stream.pipeline[-3:] = [_Samples(places, tuple(members), handler)]
    if empty_check:
        stream.append(check_empty)
    return stream


class _Indexed:
    """Shards with an index, each read in its order."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def location(self, shard: int) -> Path | RemoteFile:
        return self._dataset.shard_location(shard)

    def samples(self, shard: int, members: Collection[str]) -> Iterator[tuple[Sample, dict[str, bytes]]]:
        end, count = int(self._dataset.sample_ends[shard]), int(self._dataset.sample_counts[shard])
        for position in range(end - count, end):
            further = self._dataset.read_members(position, members) if members else {}
            yield self._dataset.read(position), further


@dataclass(frozen=True)
class _Unindexed:
    """Shards without an index, each scanned when it is opened; `choices` of captions as of an index."""

    shards: Sequence[Path | RemoteFile]
    choices: Sequence[str]
    cache: Cache

    def __len__(self) -> int:
        return len(self.shards)

    def location(self, shard: int) -> Path | RemoteFile:
        return self.shards[shard]

    def samples(self, shard: int, members: Collection[str]) -> Iterator[tuple[Sample, dict[str, bytes]]]:
        """Raises DataError for a shard that cannot be read; where it is cut, behind its last whole sample."""
        place = self.shards[shard]
        fd = os.open(place, os.O_RDONLY) if isinstance(place, Path) else self.cache.current(place.address)
        try:
            path = place if isinstance(place, Path) else Path(f"/dev/fd/{fd}")
            try:
                scanned = shard_index.scan_shard(path, self.choices)
            except UserError as error:  # compressed
                raise DataError(str(error).replace(str(path), str(place))) from None
            opened = OpenShard(fd, scanned.columns, os.fstat(fd).st_size)
            name = place.name if isinstance(place, Path) else str(place).rpartition("/")[2]
            # the last sample before a cut may have lost captions or other members
            complete = len(scanned.columns["offset"]) - (scanned.broken is not None)
            for row in range(complete):
                try:
                    sample = read_row(opened, row, name, self.choices)
                    further = read_members(opened, row, members) if members else {}
                except (BrokenTar, BrokenColumns):
                    sample = None
                if sample is None:
                    raise DataError(f"shard {place} changed while it was read")
                yield sample, further
        finally:
            os.close(fd)
        if scanned.broken is not None:
            raise DataError(f"shard {place} is broken: {scanned.broken}")


class _Place(NamedTuple):
    """A shard: the reader that has it, and its number there."""

    reader: _Indexed | _Unindexed
    number: int


class _Samples:
    """The stage of the pipeline that makes samples of shards, which come by their number among `places`."""

    def __init__(
        self, places: Sequence[_Place], members: Collection[str], handler: Callable[[Exception], bool]
    ) -> None:
        self.places, self.members, self.handler = places, members, handler

    def __call__(self, shards: Iterable[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            try:
                yield from self._of(self.places[int(shard["url"])])
            except _Stopped:
                return
            except (DataError, OSError) as error:
                if not self.handler(error):
                    return

    def _of(self, place: _Place) -> Iterator[dict[str, Any]]:
        location = str(place.reader.location(place.number))
        for sample, further in place.reader.samples(place.number, self.members):
            try:
                image = decode(sample.image)
            except BadImage as error:
                if not self.handler(BadImage(f"{location}, key {sample.key}: {error}")):
                    raise _Stopped from None
                continue
            yield {
                "__key__": sample.key,
                "__url__": location,
                "image": image,
                "captions": sample.captions,
                "cls": sample.cls,
                **further,
            }


class _Stopped(Exception):
    """The handler ended the stream."""


def _readers(
    entry: str, index: str | Path | None, captions_in: str | Mapping[str, float] | None, cache: Cache
) -> Iterator[_Indexed | _Unindexed]:
    if _is_indexed(entry, index, cache):
        yield _Indexed(open_folder(entry, index, captions_in, cache=cache))
        return
    asked = list(probabilities_of(captions_in))
    if is_remote(entry):
        for folder, wanted in named(entry):
            names = tars_of(folder) if wanted is None or _has_globs(wanted) else list(wanted)
            taken = chosen(folder, wanted, names) if wanted is not None else names
            yield _Unindexed([folder / name for name in taken], _choices_there(folder, asked), cache)
        return
    for here, tars in folders_here(entry).items():
        files = find_shards(here) if tars is None else [here / name for name in tars]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{missing[0]} does not exist; name a folder of tars, or tars.")
        yield _Unindexed(files, [captions.choice_for(here, choice) for choice in asked], cache)


def _has_globs(names: Sequence[str]) -> bool:
    return any(set("*?[") & set(name) for name in names)


def _is_indexed(entry: str, index: str | Path | None, cache: Cache) -> bool:
    """Whether all folders of an entry have an index, or one was named."""
    if index is not None:
        return True
    if not is_remote(entry):
        return all((folder / COLUMNS_FILE).is_file() for folder in folders_here(entry))
    return all(not folder.is_pipe and _has_index(folder, cache) for folder, _ in named(entry))


def _has_index(folder: RemoteFolder, cache: Cache) -> bool:
    with suppress(Forbidden):  # what a bucket that may not be listed says of files that are not there
        return cache.index(folder, COLUMNS_FILE, captions.DATASET_TYPE) is not None
    return False


def _choices_there(folder: RemoteFolder, asked: Sequence[str | None]) -> list[str]:
    """As `captions.choice_for` of a folder on this machine."""
    kind = (read_beside(folder, captions.DATASET_TYPE) or b"").strip()
    own = LINES if kind == b"retrieval" else DEFAULT
    return [own if choice is None else captions.check_choice(choice) for choice in asked]
