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
from typing import Any, Literal, NamedTuple

import numpy as np

from clipcluster.data.sampling import permutation
from clipcluster.data.shards.tar import BLOCK
from clipcluster.errors import UserError
from clipcluster.runs.files import BrokenFile, read_object
from tools.convert.records import Source, Split, option

DESCRIPTION = "conversion.json"
_FORMAT = 1  # another number where the same input would give other bytes


def _bytes(text: str) -> int:
    """Bytes of `1 GB`, `500 MB`; the units are those of the recipe."""
    from clipcluster.recipe.units import Memory

    try:
        return int(Memory.parse(text).megabytes) << 20
    except ValueError as error:
        raise UserError(f"--bytes-per-shard {text!r}: {str(error).replace('memory', 'a size')}") from None


@dataclass(frozen=True)
class Settings:
    """The options of every kind of conversion.

    A shard ends with `samples_per_shard` samples, or before `bytes_per_shard` bytes, whichever comes first.
    `shuffle` is the seed of a fixed permutation.
    """

    samples_per_shard: int | None = option(None, "Default: 10,000 (digits: 256).", metavar="N", min=1)
    bytes_per_shard: int | None = option(
        None, "Such as '1 GB', counted by image sizes.", metavar="SIZE", parser=_bytes
    )
    shuffle: int | None = option(None, "Write in a shuffled order. Default: the input's.", metavar="SEED")
    resize: int | None = option(
        None, "Shrink larger images (pixels). Default: never re-encode.", metavar="SIDE", min=1
    )
    resize_mode: Literal["keep_ratio", "keep_ratio_smallest", "square"] = option(
        "keep_ratio",
        "SIDE is the largest side: keep_ratio, the smallest: keep_ratio_smallest, both: square.",
        metavar="MODE",
    )
    quality: int = option(95, "Of resized JPEG and WebP.", metavar="Q", min=1, max=100)


class Shard(NamedTuple):
    """Samples `start` to `stop` of a split's order, to be the split's shard number `number`."""

    split: int
    number: int
    start: int
    stop: int
    name: str


@dataclass(frozen=True)
class Plan:
    """A conversion into `out`, cut into shards, split by split.

    `orders`: the numbers of each split's samples in the order they are written, (n,) int64. `finished`: the
    conversion was there already; if its input is gone, nothing else is known but the description. `notes` are
    said once, to the user.
    """

    out: Path
    description: Mapping[str, Any]
    settings: Settings
    finished: bool = False
    splits: Sequence[Split] = ()
    orders: Sequence[np.ndarray] = ()
    shards: Sequence[Shard] = ()
    notes: Sequence[str] = ()

    def folder(self, split: int) -> Path:
        """Where a split's shards lie."""
        return self.out / self.splits[split].name

    def numbers(self, shard: Shard) -> list[int]:
        """The numbers of a shard's samples, in the order they are written."""
        return [*self.orders[shard.split][shard.start : shard.stop].tolist()]


def plan(
    out: Path, kind: str, inputs: Sequence[Path], options: Any, settings: Settings, source: Source
) -> Plan:
    """Cuts a source into shards. UserError: no sample, sizes that are not known beforehand."""
    empty = [split.name or kind for split in source.splits if len(split) == 0]
    if empty or not source.splits:
        raise UserError(
            f"convert {kind}: {', '.join(empty) or 'the input'} holds no sample; nothing to convert"
        )
    orders, shards, splits = [], list[Shard](), []
    for number, split in enumerate(source.splits):
        orders.append(_order(split, settings.shuffle))
        ends = _cut(split, orders[-1], settings)
        width = max(5, len(str(len(ends) - 1)))
        shards += [
            Shard(number, place, start, stop, f"{place:0{width}d}.tar")
            for place, (start, stop) in enumerate(zip([0, *ends], ends, strict=False))
        ]
        files = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in split.files.items()}
        splits.append({"name": split.name, "samples": len(split), "shards": len(ends), "files": files})
    description = {
        **describe(kind, inputs, options, settings),
        "splits": splits,
        "files_read": [list(file) for file in source.inputs],
    }
    return Plan(out, description, settings, False, source.splits, orders, shards, source.notes)


def _order(split: Split, seed: int | None) -> np.ndarray:
    if seed is None:
        return np.arange(len(split))
    return permutation.permutation(permutation.key("convert", seed, split.name), len(split))


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


def _cut(split: Split, order: np.ndarray, settings: Settings) -> list[int]:
    """Where each shard ends."""
    size, most = len(order), settings.samples_per_shard or len(order)
    if settings.bytes_per_shard is None:
        return [*range(most, size, most), size]
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
    return ends


def read_description(out: Path) -> dict[str, Any] | None:
    """What an earlier call left in `out`; None if there is nothing. UserError: a damaged one."""
    try:
        return read_object(out / DESCRIPTION)
    except BrokenFile:
        raise UserError(f"{out / DESCRIPTION} is damaged; remove {out} and convert again") from None


def refuse_differences(out: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """UserError that names what differs between an earlier conversion into `out` and this one."""
    before, after = _facts(was), _facts(now)
    found = [
        f"{name} was {before.get(name)}, is {after.get(name)}"
        for name in {**after, **before}
        if before.get(name) != after.get(name)
    ]
    if was.get("input") == now["input"]:  # another input has other files
        changed = {*map(tuple, was.get("files_read") or ())} ^ {*map(tuple, now["files_read"])}
        found += [f"{path} was changed, added or removed" for path in sorted({path for path, *_ in changed})]
    if not found and was.get("splits") != now["splits"]:
        found = [f"the splits were {was.get('splits')}, are {now['splits']}"]
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(
            f"{out} holds a conversion of something else: {'; '.join(found[:5])}{more}. "
            "Give another --out, the same input and options, or remove the folder first"
        )


def _facts(description: Mapping[str, Any]) -> dict[str, Any]:
    """What two conversions are compared by, under the names that a message has for it."""
    options = {**(description.get("options") or {}), **(description.get("settings") or {})}
    return {
        **{name: description.get(name) for name in ("format", "kind", "input")},
        **{"--" + name.replace("_", "-"): value for name, value in options.items()},
    }
