"""`clipcluster shards verify DIR …`: reads every byte again and compares with the index."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipcluster.data.shards import shard_index, shard_list
from clipcluster.data.shards.columns import BrokenColumns
from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.find import compressed_tars, find_shards
from clipcluster.data.shards.folder_index import IndexedFolder
from clipcluster.runs.files import file_sha256
from tools.shards.pool import over_shards
from tools.shards.survey import Survey, survey

GONE, ROWS, CHANGED, CUT, UNKNOWN = "gone", "rows", "changed", "cut", "unknown"  # faults of a shard
_NAMED = 20  # empty shards that are named


@dataclass
class Report:
    """What was found: `samples`, `captions`, `bytes` of the shards that can be read; used + bad = samples.

    `broken` names shards: gone, changed, not in the index, or cut (the samples before the cut are counted),
    each with its kind of `fault`. `kinds` counts the samples by the content of their image. What is no
    sample: `without_image`, and `duplicates`, whose key came before in their shard. `notes` break nothing:
    shards without a sample, files that are not read. `repairs` is what a repair before this look did and
    what it left alone.
    """

    folder: str
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    captions: int = 0
    used: int = 0
    without_caption: int = 0
    without_image: int = 0
    duplicates: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    bad: list[dict[str, Any]] = field(default_factory=list)
    broken: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    repairs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.bad and not self.broken

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "whole": self.whole}


class _Look(NamedTuple):
    """One shard: what is wrong with it (None: nothing), why, and its samples if they can be read."""

    fault: str | None
    reason: str
    samples: Survey | None


def verify(
    folder: Path,
    index: Path | None = None,
    *,
    images: bool = True,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Hashes and scans every shard again, and decodes every image if `images`, in `workers` processes.

    A shard that is gone, changed, cut, or whose rows are not those of its tar stands in `broken`, a tar that
    the index does not know too; an image that cannot be decoded in `bad`. UserError if there is no index.
    """
    shards = Dataset([IndexedFolder(folder, index or folder, None)])
    found = shard_list.read_summary(folder, index)
    report = Report(
        str(folder), shards=len(shards), without_image=found.without_image, duplicates=found.duplicates
    )
    task = partial(_look, index=index or folder, choices=tuple(found.choices), images=images)
    alone = 0 if workers == 1 and not images else workers
    looks = over_shards(task, shards, workers=alone, progress=progress)
    for number, (name, look) in enumerate(zip(shards.shard_names, looks, strict=True)):
        if look.fault is not None:
            report.broken.append({"shard": name, "key": None, "reason": look.reason, "fault": look.fault})
        if look.samples is not None:
            _count(shards, number, look.samples, report)
    known = set(shards.shard_names)
    for path in find_shards(folder):
        if path.name not in known:
            reason = "not in the index, never drawn"
            report.broken.append({"shard": path.name, "key": None, "reason": reason, "fault": UNKNOWN})
    report.kinds = dict(Counter(report.kinds).most_common())
    report.notes = [*_empty(looks), *other_files(folder)]
    shards.close()
    return report


def _look(
    shards: Dataset,
    shard: int,
    lost: Mapping[int, str],
    at: Callable[[int], None],
    *,
    index: Path,
    choices: tuple[str, ...],
    images: bool,
) -> _Look:
    fault, reason = _shard_fault(shards, shard, index, choices)
    readable = fault in (None, CUT)
    samples = survey(shards, shard, lost, at, decoded=images, details=False) if readable else None
    return _Look(fault, reason, samples)


def _shard_fault(
    shards: Dataset, number: int, index: Path, choices: tuple[str, ...]
) -> tuple[str | None, str]:
    """What is wrong with a shard (None: nothing), and the reason."""
    path = shards.shard_path(number)
    if not path.is_file():
        return GONE, "gone"
    try:
        meta, rows = shard_index.read_shard_index(shard_index.shard_index_path(index, path.name))
    except (OSError, BrokenColumns) as error:
        return ROWS, f"its shard index cannot be read: {error}"
    digest, indexed = file_sha256(path), shards.sha256(number)
    if digest != indexed:
        return CHANGED, f"changed since it was indexed: sha256 is {digest}, was {indexed}"
    scanned = shard_index.scan_shard(path, choices)
    if digest != meta["sha256"] or any(
        name not in rows or not np.array_equal(rows[name], column) for name, column in scanned.columns.items()
    ):
        return ROWS, "its shard index does not match the tar"
    return (CUT, scanned.broken) if scanned.broken else (None, "")


def _count(shards: Dataset, number: int, samples: Survey, report: Report) -> None:
    first = int(shards.sample_counts[:number].sum())
    count = int(shards.sample_counts[number])
    counts = shards.caption_counts(slice(first, first + count))
    report.samples += count
    report.captions += int(counts.sum(dtype=np.int64))
    report.without_caption += int((counts == 0).sum())
    report.bytes += shards.shard_path(number).stat().st_size
    report.bad += samples.bad
    report.used += count - len(samples.bad)
    report.kinds = dict(Counter(report.kinds) + samples.kinds)


def _empty(looks: list[_Look]) -> list[str]:
    """Shards that hold nothing."""
    names = [look.samples.shard for look in looks if look.samples and not len(look.samples.usable)]
    more = [f"… and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return [f"{name}: holds no sample with an image" for name in names[:_NAMED]] + more


def other_files(folder: Path) -> list[str]:
    """What lies beside the shards and looks like one, but is not read."""
    compressed = [
        f"{name}: compressed, not read; unpack it to .tar first" for name in compressed_tars(folder)
    ]
    return compressed + [
        f"{path.name}: the original of a repaired shard, not read; remove it when it is no longer needed"
        for path in sorted(folder.glob("*.tar.broken*"))
    ]
