"""Where a rank prints: its file, its logger, and a line at each end for a person who started it by hand."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
from pathlib import Path
from typing import TextIO

from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run


def announce(run: Run, attempt: Attempt) -> int:
    """Say where the output of a run started by hand goes; a descriptor that stays where this was said."""
    print(f"{run.name}: attempt {attempt.number}; to follow it: clipcluster logs -f {run.path}", flush=True)
    return os.dup(1)


def say_ending(terminal: int, run: Run, attempt: Attempt, code: int) -> None:
    """One line on the terminal that a run was started from: how it ended, why, and what to do."""
    made = attempt.outcome() or {"outcome": f"ended with code {code}"}
    said = "; ".join(filter(None, (made.get("reason"), made.get("advice"))))
    step = f" at step {attempt.step}" if attempt.step is not None else ""
    line = f"{run.name}: {made['outcome']}{step}" + (f" ({said})" if said else "") + "\n"
    with contextlib.suppress(OSError):  # the terminal may have gone
        os.write(terminal, line.encode(errors="replace"))
    os.close(terminal)


def redirect(path: Path) -> None:
    """Send file descriptors 1 and 2 to `path`: what C libraries and child processes write lands there too."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for number, name in ((1, "stdout"), (2, "stderr")):
        # Opened anew: the old objects may have been replaced, closed or buffered by blocks.
        stream = open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
    faulthandler.enable(file=sys.stderr)


def log_to(stream: TextIO, rank: int) -> logging.Logger:
    """Send the logger "clipcluster" to `stream` alone, one line a message; returns the logger."""
    logger = logging.getLogger("clipcluster")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return logger
