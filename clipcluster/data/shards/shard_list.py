"""index.json: the shards of a folder's index, one entry each, and the sums over them."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipcluster.data.shards import captions
from clipcluster.data.shards.find import compressed_tars
from clipcluster.data.shards.shard_index import FORMAT
from clipcluster.errors import UserError

ENTRIES_FILE = "index.json"

_LARGEST = (1 << 63) - 1
_NAME = re.compile(r"[^/\0]+")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the list. `broken` is where and why the tar could not be read further, or None.

    `captions` and `without_caption` (samples) are by choice; `duplicates` are samples whose key came before.
    """

    name: str
    samples: int
    captions: dict[str, int]
    bytes: int
    sha256: str
    mtime_ns: int
    without_caption: dict[str, int] = field(default_factory=dict)
    without_image: int = 0
    duplicates: int = 0
    broken: str | None = None


@dataclass(frozen=True)
class ChoiceCounts:
    """What one choice of captions finds in a folder: captions, samples with one (`used`) and without."""

    captions: int
    used: int
    without_caption: int


@dataclass(frozen=True)
class IndexSummary:
    """What an index holds, for the command's answer.

    `captions`, `used` and `without_caption` are those of `captions_choice`, the index's first; `choices` has
    every choice. All the tars hold is samples + without_image + duplicates. `left_out` are compressed tars.
    """

    folder: Path | str
    index: Path
    captions_choice: str
    shards: int
    samples: int
    captions: int
    bytes: int
    used: int
    without_caption: int
    without_image: int
    duplicates: int
    choices: dict[str, ChoiceCounts]
    broken: list[dict[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def read_summary(folder: Path, index: Path | None = None) -> IndexSummary:
    """What an index on disk holds, from its list. UserError if there is none that can be read."""
    target = index or folder
    choices, entries = read_list(target)
    if not choices or any(not entry.captions for entry in entries.values()):
        file, place = target / ENTRIES_FILE, "" if target == folder else f" --index {target}"
        command = f"clipcluster shards index {folder}{place}"
        if file.exists():
            raise UserError(f"{file} is damaged or of another format; rebuild it with: {command}")
        raise UserError(f"{target}: no index there; make it with: {command}")
    return summarize(folder, target, choices, list(entries.values()))


def read_list(target: Path) -> tuple[tuple[str, ...], dict[str, ShardEntry]]:
    """Choices of captions and entries by name of the list at `target`; ((), {}) if it cannot be read.

    Of a list of format 1 the hashes are taken over, so that the index is made anew without reading all.
    """
    try:
        document = json.loads((target / ENTRIES_FILE).read_text(encoding="utf-8"))
        old = document["format"] == 1
        if not old and document["format"] != FORMAT:
            return (), {}
        choices = [document["captions_choice"]] if old else document["captions"]
        counted: dict[str, Any] = {"captions": {}, "without_caption": {}} if old else {}
        entries = [entry_of({**entry, **counted}) for entry in document["shards"]]
        if any(set(entry.captions) != (set() if old else set(choices)) for entry in entries):
            return (), {}
        return tuple(map(captions.check_choice, choices)), {entry.name: entry for entry in entries}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError):
        return (), {}


def entry_of(document: Any) -> ShardEntry:
    """A shard's entry as it was written to JSON, by whomever. ValueError or TypeError if it is none."""
    entry = ShardEntry(**document)
    counts = [entry.samples, entry.bytes, entry.without_image, entry.duplicates]
    counts += [*{**entry.captions}.values(), *{**entry.without_caption}.values()]
    if (
        not _NAME.fullmatch(entry.name)
        or not _SHA256.fullmatch(entry.sha256)
        or not isinstance(entry.broken, str | None)
        or not all(type(count) is int and 0 <= count <= _LARGEST for count in counts)
        or type(entry.mtime_ns) is not int
        or abs(entry.mtime_ns) > _LARGEST
    ):
        raise ValueError(f"{document!r} describes no shard")
    return entry


def plain(entry: ShardEntry) -> dict[str, Any]:
    """An entry without its empty fields."""
    return {
        name: value
        for name, value in vars(entry).items()
        if value not in (None, 0, {}) or name in ("samples", "captions", "bytes")
    }


def summarize(
    folder: Path | str, target: Path, choices: tuple[str, ...], entries: Sequence[ShardEntry]
) -> IndexSummary:
    """The sums over a list of shards."""
    samples = sum(entry.samples for entry in entries)
    counts = {}
    for choice in choices:
        without = sum(entry.without_caption.get(choice, 0) for entry in entries)
        found = sum(entry.captions[choice] for entry in entries)
        counts[choice] = ChoiceCounts(found, samples - without, without)
    return IndexSummary(
        folder=folder,
        index=target,
        captions_choice=choices[0],
        shards=len(entries),
        samples=samples,
        **vars(counts[choices[0]]),
        bytes=sum(entry.bytes for entry in entries),
        without_image=sum(entry.without_image for entry in entries),
        duplicates=sum(entry.duplicates for entry in entries),
        choices=counts,
        broken=[{"shard": entry.name, "reason": entry.broken} for entry in entries if entry.broken],
        left_out=compressed_tars(folder) if isinstance(folder, Path) and folder.is_dir() else [],
    )
