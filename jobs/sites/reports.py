"""The files of a site check: what each rank and the batch script report, and the clocks beside them.

The submitter and the ranks write their time into files again and again, and read each other's. A clock that
is read is at most as late as it was written, so that each reading bounds the difference of two clocks from
one side.
"""

from __future__ import annotations

import contextlib
import errno
import json
import time
from pathlib import Path
from typing import Any

from clipcluster.runs import files

BATCH = "batch.json"
CLOCK = "clock.json"


def rank_file(folder: Path, rank: int) -> Path:
    """Where a rank reports."""
    return folder / f"rank-{rank}.json"


def read(path: Path) -> dict[str, Any] | None:
    """A report as it is now; None while there is none."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # NFS: replaced between opening and reading it
            raise
        return None
    return value if isinstance(value, dict) else None


def tell_time(folder: Path) -> None:
    """Write this machine's time for the ranks."""
    files.write_bytes(folder / CLOCK, json.dumps({"time": time.time()}).encode(), durable=False)


class Report:
    """What a rank reports, written anew with every fact, so that a kill leaves what was found before it."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.file = folder, rank_file(folder, rank)
        self.said: dict[str, Any] = {"rank": rank}

    def add(self, **facts: Any) -> None:
        """Add facts, the time, and how much at most this machine's clock is ahead of the submitter's."""
        self.said.update(facts)
        theirs = read(self.folder / CLOCK)
        if theirs is not None:
            ahead = time.time() - theirs["time"]
            self.said["ahead_at_most"] = min(ahead, self.said.get("ahead_at_most", ahead))
        self.said["time"] = time.time()
        with contextlib.suppress(FileNotFoundError):  # the submitter has left
            files.write_json(self.file, self.said)
