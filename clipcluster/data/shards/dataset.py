"""Samples of a source, read by offset through its index. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from clipcluster.data.shards import captions, shard_index
from clipcluster.data.shards.opened import OpenShard, OpenShards, in_threads
from clipcluster.data.shards.tar import NO_BYTES, read_at, scan

FETCHES = 4  # shards that one reader fetches at once

T = TypeVar("T")


class Sample(NamedTuple):
    """One sample of a shard: `image` holds the original bytes, `cls` is -1 if it has no class.

    origins: for each caption the choice it comes from and its number among the texts there.
    """

    key: str
    shard: str
    image: bytes
    captions: list[str]
    cls: int
    origins: list[tuple[str, int]]


def read_row(opened: OpenShard, row: int, shard: str, choices: Sequence[str]) -> Sample | None:
    """The sample of a row of an open shard, with its captions by each choice, one after the other.

    None where the shard is not as it was indexed. Raises BrokenTar, BrokenColumns and OSError.
    """
    member = next(scan(opened.fd, opened.begin(row)), None)
    if member is None:
        return None
    name = shard_index.sample_name(member.name)
    image = read_at(opened.fd, *opened.image(row))
    texts: list[str] = []
    origins: list[tuple[str, int]] = []
    for choice in choices:
        kind = opened.columns[f"text_kind/{choice}"].item(row)
        if kind == captions.NO_TEXT:
            continue
        content = captions.parsed(kind, read_at(opened.fd, *opened.text(row, choice)))
        found = captions.numbered(kind, content, choice)
        if len(found) != opened.columns[f"captions/{choice}"].item(row):
            return None
        texts += [text for _, text in found]
        origins += [(choice, number) for number, _ in found]
    key = name[0] if name else member.name
    return Sample(key, shard, image, texts, opened.columns["class"].item(row), origins)


def read_members(opened: OpenShard, row: int, names: Collection[str]) -> dict[str, bytes]:
    """The bytes of further members of a row's sample; `names` and errors as of `Dataset.read_members`."""
    _, found = next(shard_index.samples(opened.fd, opened.begin(row)), ("", {}))
    there = {name for name in found if found[name].size != NO_BYTES}
    chosen = {name: [own for own in name.split("|") if own in there][:1] for name in names}
    return {
        name: read_at(opened.fd, found[own].offset, found[own].size)
        for name, extensions in chosen.items()
        for own in extensions
    }


class Dataset(OpenShards):
    """A source of samples that can be read: numbered 0 … n_samples - 1 in the order of the shards' names."""

    def read(self, position: int, *, text: bool = True) -> Sample:
        """Reads one sample; without its captions if not `text`.

        Raises DataError if the shard is missing or has changed since it was indexed, OSError if the disk
        still fails after the retries.
        """
        return self._with_open(position, partial(self._read, text))

    def _read(self, text: bool, shard: int, row: int, opened: OpenShard) -> Sample:
        choices = self._choices_at(shard) if text else ()
        sample = read_row(opened, row, self.shard_name(shard), choices)
        if sample is None:
            raise self._changed(shard)
        return sample

    def read_members(self, position: int, names: Collection[str]) -> dict[str, bytes]:
        """The bytes of further members of a sample by name, without those that it does not have.

        A name is an extension, what follows the key's first dot, in lower case (`npz`, `paug.json`), or
        several of which the first that is there is taken (`npz|pth.gz`). Raises as `read`.
        """
        return self._with_open(position, lambda shard, row, opened: read_members(opened, row, names))

    def begin(self, position: int) -> tuple[int, int]:
        """A handle on the shard of a sample, which stays this source's, and the byte where the sample begins.

        Raises as `read`.
        """
        return self._with_open(position, lambda shard, row, opened: (opened.fd, opened.begin(row)))

    def _with_open(self, position: int, action: Callable[[int, int, OpenShard], T]) -> T:
        """What `action` makes of the shard of a sample, its row in it and the open shard."""
        shard, row = self.locate(position)
        return self._with_retries(shard, lambda: action(shard, row, self._handle(shard)))

    def announce(self, positions: Iterable[int], *, members: bool = False) -> None:
        """Tells the kernel which images and captions will be read soon; with `members`, whole samples.

        The remote ones among several shards are brought into the cache at once.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        rows_of: dict[int, list[int]] = {}
        for position in positions:
            shard, row = self.locate(position)
            rows_of.setdefault(shard, []).append(row)
        remote = [shard for shard in rows_of if shard not in self._open and self._is_remote(shard)]
        if len(remote) > 1:
            in_threads(FETCHES, self._warm, remote)
        for shard, rows in rows_of.items():
            self._with_retries(shard, partial(self._announce, shard, rows, members))

    def _announce(self, shard: int, rows: Sequence[int], members: bool) -> None:
        opened, choices = self._handle(shard), self._choices_at(shard)
        for row in rows:
            begin = opened.begin(row)
            spans = [opened.image(row), *(opened.text(row, choice) for choice in choices)]
            end = max(map(sum, spans), default=begin)
            if members:  # they are between this sample's beginning and the next one's
                last = row + 1 == len(opened.columns["offset"])
                end = max(end, opened.size if last else opened.begin(row + 1))
            os.posix_fadvise(opened.fd, begin, max(1, end - begin), os.POSIX_FADV_WILLNEED)

    def _warm(self, shard: int) -> None:
        os.close(self._with_retries(shard, partial(self._fetch, shard)))
