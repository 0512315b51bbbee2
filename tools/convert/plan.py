"""What a conversion will do, before it does it: its settings, its shards, and the description it leaves.

The description, `conversion.json` in the output folder, is what a later call is compared with: a conversion
goes on, or is left as it is, only with the inputs and options it was begun with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipcluster.data.sampling import permutation
from clipcluster.data.shards.tar import BLOCK
from clipcluster.errors import UserError
from tools.convert.records import Source, Split

DESCRIPTION = "conversion.json"
_FORMAT = 1  # another number where the same input would give other bytes


@dataclass(frozen=True)
class Settings:
    """The options of every kind of conversion.

    A shard ends with `samples_per_shard` samples, or before `bytes_per_shard` bytes, whichever comes first.
    `shuffle` is the seed of a fixed permutation, None: the input's order. `resize` is a side in pixels, None:
    images are never re-encoded; `resize_mode` says which (RESIZE_MODES); `quality` is that of JPEG and WebP.
    """

    samples_per_shard: int | None = None
    bytes_per_shard: int | None = None
    shuffle: int | None = None
    resize: int | None = None
    resize_mode: str = "keep_ratio"
    quality: int = 95


RESIZE_MODES = ("keep_ratio", "keep_ratio_smallest", "square")


class Shard(NamedTuple):
    """Samples `start` to `stop` of a split's order, to be the split's shard number `number`."""

    split: int
    number: int
    start: int
    stop: int
    name: str


@dataclass(frozen=True)
class Plan:
    """A conversion into `out`, cut into shards; `ends` (n_shards,) int64 for every split."""

    out: Path
    splits: Sequence[Split]
    settings: Settings
    ends: Sequence[np.ndarray]
    description: Mapping[str, Any]

    def folder(self, split: int) -> Path:
        """Where a split's shards lie."""
        return self.out / self.splits[split].name

    def shards(self) -> list[Shard]:
        """All shards, split by split."""
        return [
            Shard(split, number, start, stop, f"{number:0{max(5, len(str(len(ends) - 1)))}d}.tar")
            for split, ends in enumerate(self.ends)
            for number, (start, stop) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))
        ]

    def order(self, split: int) -> np.ndarray:
        """The numbers of a split's samples in the order they are written, (n,) int64."""
        size = len(self.splits[split])
        if self.settings.shuffle is None:
            return np.arange(size)
        name = self.splits[split].name
        return permutation.permutation(permutation.key("convert", self.settings.shuffle, name), size)


def plan(
    out: Path, kind: str, inputs: Sequence[Path], options: Any, settings: Settings, source: Source
) -> Plan:
    """Cuts a source into shards. UserError: no sample, sizes that are not known beforehand."""
    empty = [split.name or kind for split in source.splits if len(split) == 0]
    if empty or not source.splits:
        raise UserError(
            f"convert {kind}: {', '.join(empty) or 'the input'} holds no sample; nothing to convert"
        )
    unfinished = Plan(out, source.splits, settings, [], {})
    ends = [_cut(split, unfinished.order(number), settings) for number, split in enumerate(source.splits)]
    description = {
        **describe(kind, inputs, options, settings),
        "splits": [
            {
                "name": split.name,
                "samples": len(split),
                "shards": len(cuts),
                "files": {
                    name: hashlib.sha256(text.encode()).hexdigest() for name, text in split.files.items()
                },
            }
            for split, cuts in zip(source.splits, ends, strict=True)
        ],
        "files_read": [list(file) for file in source.inputs],
    }
    return Plan(out, source.splits, settings, ends, description)


def describe(kind: str, inputs: Sequence[Path], options: Any, settings: Settings) -> dict[str, Any]:
    """The part of a description that is known without opening the inputs."""
    description = {
        "format": _FORMAT,
        "kind": kind,
        "input": [os.path.abspath(path) for path in inputs],
        "options": asdict(options),
        "settings": asdict(settings),
    }
    return dict(json.loads(json.dumps(description, default=str)))  # as it will be read again


def _cut(split: Split, order: np.ndarray, settings: Settings) -> np.ndarray:
    """Where each shard ends, (n_shards,) int64."""
    size, most = len(order), settings.samples_per_shard or len(order)
    if settings.bytes_per_shard is None:
        return np.append(np.arange(most, size, most), size)
    sizes = np.asarray(split.sizes(), np.int64)[order]
    if not sizes.any():
        raise UserError(
            "--bytes-per-shard: this input does not tell the images' sizes beforehand; "
            "give --samples-per-shard instead"
        )
    # an image takes whole blocks and a header; the small members are not counted
    totals = np.cumsum(-(-sizes // BLOCK) * BLOCK + BLOCK)
    ends, start, before = [], 0, 0
    while start < size:
        fits = int(np.searchsorted(totals, before + settings.bytes_per_shard, side="right"))
        start = min(max(fits, start + 1), start + most, size)
        before = int(totals[start - 1])
        ends.append(start)
    return np.array(ends, np.int64)


def read_description(out: Path) -> dict[str, Any] | None:
    """What an earlier call left in `out`; None if there is nothing. UserError: a damaged one."""
    path = out / DESCRIPTION
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove {out} and convert again") from None
    return document if isinstance(document, dict) else {}


def refuse_differences(out: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """UserError that names what differs between an earlier conversion into `out` and this one."""
    found = list(_differences(was, now))
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(
            f"{out} holds a conversion of something else: {'; '.join(found[:5])}{more}. "
            "Give another --out, the same input and options, or remove the folder first"
        )


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = [
        f"{name} was {was.get(name)!r}, is {now[name]!r}"
        for name in ("format", "kind", "input")
        if was.get(name) != now[name]
    ]
    for group in ("options", "settings"):
        before, after = was.get(group) or {}, now[group]
        for name in sorted({*before, *after}):
            if before.get(name) != after.get(name):
                option = "--" + name.replace("_", "-")
                found.append(f"{option} was {before.get(name)!r}, is {after.get(name)!r}")
    if found:
        return found
    files_were = {file[0]: file for file in was.get("files_read") or []}
    files_are = {file[0]: file for file in now["files_read"]}
    for path in sorted({*files_were, *files_are}):
        if files_were.get(path) != files_are.get(path):
            found.append(_file_difference(path, files_were.get(path), files_are.get(path)))
    if not found and was.get("splits") != now["splits"]:
        found.append(f"the splits were {_splits(was.get('splits') or [])}, are {_splits(now['splits'])}")
    return found


def _file_difference(path: str, was: Sequence[Any] | None, now: Sequence[Any] | None) -> str:
    if was is None or now is None:
        return f"{path} " + ("is new" if was is None else "is gone")
    if was[1] != now[1]:
        return f"{path} had {was[1]:,} bytes, has {now[1]:,}"
    return f"{path} was changed since"


def _splits(splits: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{split.get('name') or '.'} ({split.get('samples')} samples)" for split in splits)
