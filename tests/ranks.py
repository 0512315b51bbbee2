"""The processes of a run's ranks on this machine, found by their logs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from clipcluster.runs.attempts import Attempt


def kill_rank(attempt: Attempt, rank: int) -> bool:
    """SIGKILL one rank; False where no process of it writes to its log (yet, or any more)."""
    log = os.path.realpath(attempt.path / f"rank-{rank}.out")
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            found = os.readlink(folder / "fd/1") == log and b"submitit" in (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile
        if found:
            os.kill(int(folder.name), signal.SIGKILL)
            return True
    return False
