"""The job's own log: what the batch side says there, and its last lines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from clipcluster.runs.attempts import Attempt


def say(text: str) -> None:
    """One line for the job's own log; standard output belongs to the attempt's number."""
    print(f"clipcluster: {text}", file=sys.stderr, flush=True)


def marker(attempt: Attempt) -> str:
    """The line that opens an attempt in the job's log, which all attempts of a job share."""
    return f"attempt {attempt.number} of {attempt.run.name} begins"


def tail(paths: Sequence[Path], *, after: str = "", lines: int = 15, limit: int = 65536) -> str:
    """The last lines of each file, of what follows the last line with `after`; absent files are empty."""
    parts = []
    for path in paths:
        try:
            with path.open("rb") as stream:
                stream.seek(max(0, path.stat().st_size - limit))
                text = stream.read().decode(errors="replace")
        except OSError:
            continue
        if after and after in text:
            text = text.rpartition(after)[2].partition("\n")[2]
        parts.extend([line for line in text.splitlines() if line.strip()][-lines:])
    return "\n".join(parts)
