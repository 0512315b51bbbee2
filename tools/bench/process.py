"""Programs that are measured in turn: each starts once, waits, and works for some seconds on request.

So other load on the machine affects all of them alike, and the time to start is in no figure.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError


class Contender:
    """One program: it answers {"seconds": …} with `images`, `seconds` and the `untimed` images before."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.pid = 0
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=dict(environment),
                text=True,
            )
        except OSError as error:
            raise UserError(f"{command[0]} cannot be started: {error.strerror}") from None
        self.pid = self._process.pid

    def start(self, seconds: float) -> None:
        """Tells it to work for so many seconds."""
        if self._process.stdin is not None:
            self._process.stdin.write(json.dumps({"seconds": seconds}) + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Ends it and its children, and waits."""
        for pid in [self.pid, *descendants(self.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._stderr.close()

    def answer(self) -> dict[str, Any]:
        """What it says of itself once it is ready, then what it did each time it was started.

        Waits for it. UserError with its last line of output if it ended early.
        """
        line = self._process.stdout.readline() if self._process.stdout else ""
        if line:
            return dict(json.loads(line))
        self._process.wait()
        self._stderr.seek(0)
        lines = [text.strip() for text in self._stderr.read().splitlines() if text.strip()]
        raise UserError(f"{self.name} ended early: {lines[-1] if lines else 'it printed no error'}")


def serve(about: Mapping[str, Any], take: Callable[[], int], lead: int = 0) -> None:
    """A contender's side: `take` loads some images and returns how many; ends with its standard input.

    The first `lead` calls of a repetition are not timed: their images were loaded while the others ran.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    answers.write(json.dumps(dict(about)) + "\n")
    for line in sys.stdin:
        seconds = float(json.loads(line)["seconds"])
        before = sum(take() for _ in range(lead))
        begin, images = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            images += take()
        elapsed = time.perf_counter() - begin
        answers.write(json.dumps({"images": images, "seconds": elapsed, "untimed": before}) + "\n")


def descendants(pid: int) -> list[int]:
    """The descendants of a process, children first; empty where the system has no /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found = [pid]
    for process in found:
        found += parents.get(process, [])
    return found[1:]


def cpu_seconds(pid: int) -> float | None:
    """Processor time of a process and its living descendants, in seconds; None without /proc."""
    total = 0
    for process in (pid, *descendants(pid)):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK") if total else None


def unique_bytes(pid: int) -> int | None:
    """Memory that a process shares with no other (USS), in bytes; None without /proc."""
    return sum(_private(pid), 0) if Path(f"/proc/{pid}/smaps_rollup").exists() else None


def _private(pid: int) -> Iterator[int]:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("Private_"):
            yield int(line.split()[1]) * 1024
