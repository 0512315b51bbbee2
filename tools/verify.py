"""`clipcluster shards verify DIR`: reads every byte again and compares with the index."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.data import index as indexes
from clipcluster.data.columns import BrokenColumns, read_columns
from clipcluster.data.decode import BadImage, decode
from clipcluster.data.shards import Part, Shards


@dataclass
class Report:
    """What was found: `samples`, `captions` and `bytes` of the shards that can be read, used + bad = samples.

    `broken` names shards: gone, changed, not in the index, or cut (the samples before the cut are counted).
    """

    folder: str
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    captions: int = 0
    used: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)
    broken: list[dict[str, Any]] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.bad and not self.broken

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "whole": self.whole}


def verify(
    folder: Path,
    index: Path | None = None,
    *,
    images: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Hashes and scans every shard again, and decodes every image if `images`.

    A shard that is gone, changed, cut, or whose rows are not those of its tar stands in `broken` (`shard`,
    `key` None, `reason`), a tar that the index does not know too; an image that cannot be decoded in `bad`.
    UserError if there is no index.
    """
    shards = Shards([Part(folder, index or folder, None)])
    choice, report = (
        indexes.read_summary(folder, index).captions_choice,
        Report(str(folder), shards=len(shards)),
    )
    for number, name in enumerate(shards.shard_names):
        reason, readable = _shard_fault(shards, number, index or folder, choice)
        if reason is not None:
            report.broken.append({"shard": name, "key": None, "reason": reason})
        if readable:
            _count(shards, number, report, images)
        if progress is not None:
            progress(number + 1, len(shards))
    known = set(shards.shard_names)
    for path in indexes.find_shards(folder):
        if path.name not in known:
            report.broken.append({"shard": path.name, "key": None, "reason": "not in the index, never drawn"})
    shards.close()
    return report


def _shard_fault(shards: Shards, number: int, index: Path, choice: str) -> tuple[str | None, bool]:
    """What is wrong with a shard (None: nothing), and whether its samples can be read all the same."""
    path = shards.shard_path(number)
    if not path.is_file():
        return "gone", False
    try:
        meta, rows = read_columns(indexes.shard_index(index, path.name))
    except (OSError, BrokenColumns) as error:
        return f"its rows in the index cannot be read: {error}", False
    digest = indexes.file_sha256(path)
    if digest != meta["sha256"] or digest != shards.sha256(number):
        return f"changed since it was indexed: sha256 is {digest}, was {shards.sha256(number)}", False
    _, columns, broken = indexes.scan_shard(path, choice)
    if any(name not in rows or not np.array_equal(rows[name], column) for name, column in columns.items()):
        return "its rows in the index are not those of the tar", False
    return broken, True


def _count(shards: Shards, number: int, report: Report, images: bool) -> None:
    first = int(shards.sample_counts[:number].sum())
    count = int(shards.sample_counts[number])
    report.samples += count
    report.captions += int(shards.caption_counts[first : first + count].sum(dtype=np.int64))
    report.bytes += shards.shard_path(number).stat().st_size
    for position in range(first, first + count) if images else ():
        sample = shards.read(position, text=False)
        try:
            decode(sample.image)
        except BadImage as error:
            report.bad.append({"shard": sample.shard, "key": sample.key, "reason": str(error)})
    report.used = report.samples - len(report.bad)
