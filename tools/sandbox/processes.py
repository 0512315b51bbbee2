"""Which processes belong to a sandbox, known by what they hold and carry, never by their names alone.

A daemon or step daemon holds one of the sandbox's log files open. A task carries the sandbox's unique
cluster name and its node's name in its environment, which only slurmd puts there. Descendants of either
belong too. So a shell that merely has SLURM_CONF set is never touched.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tools.sandbox.config import Sandbox

PROGRAMS = ("slurmctld", "slurmd", "slurmstepd")
CONTROL = "slurmctld"
DAEMONS = ("slurmctld", "slurmd")


@dataclass(frozen=True)
class Owned:
    """A process of the sandbox."""

    pid: int
    kind: str  # slurmctld, slurmd, slurmstepd or task
    node: str  # "n1", …; "slurmctld" for what belongs to no node


def owned(sandbox: Sandbox) -> list[Owned]:
    """All living processes of the sandbox; zombies are dead."""
    parents: dict[int, int] = {}
    found: dict[int, Owned] = {}
    for pid in _pids():
        parent = _parent(pid)
        if parent is None:
            continue
        parents[pid] = parent
        process = _daemon(pid, sandbox) or _task(pid, sandbox)
        if process is not None:
            found[pid] = process
    for pid in list(parents):
        ancestor = _first_owned(pid, parents, found)
        # What slurmd starts and holds no log yet is a step daemon on its way.
        if ancestor is not None and pid not in found:
            found[pid] = Owned(pid, "task", ancestor.node)
    found.pop(os.getpid(), None)
    return sorted(found.values(), key=lambda process: process.pid)


def end(
    sandbox: Sandbox, *, node: str | None = None, kinds: tuple[str, ...] = (), seconds: float = 10
) -> int:
    """SIGKILL the sandbox's processes (of one node, of some kinds) until none is left; returns how many.

    Raises TimeoutError if some live on after `seconds`.
    """
    deadline = time.monotonic() + seconds
    ended: set[int] = set()
    quiet = 0
    while quiet < 3:  # a process forked during one look shows in the next
        left = [
            process
            for process in owned(sandbox)
            if (node is None or process.node == node) and (not kinds or process.kind in kinds)
        ]
        quiet = 0 if left else quiet + 1
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            ended.add(process.pid)
        if left and time.monotonic() > deadline:
            raise TimeoutError(f"still alive after SIGKILL: {', '.join(str(p.pid) for p in left)}")
        time.sleep(0.02)
        _reap(ended)
    return len(ended)


def control_is_alive(sandbox: Sandbox) -> bool:
    """Whether the sandbox's slurmctld runs."""
    return any(process.kind == CONTROL for process in owned(sandbox))


def _reap(pids: set[int]) -> None:
    """Take the exit of those that are this process's own children, so that they do not stay as zombies."""
    for pid in pids:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def _parent(pid: int) -> int | None:
    """The parent's pid; None for a process that is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return None if state in "ZX" else int(parent)


def _daemon(pid: int, sandbox: Sandbox) -> Owned | None:
    try:
        program = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
        kind = next(
            (name for name in sorted(PROGRAMS, key=len, reverse=True) if program.startswith(name)), None
        )
        if kind is None:
            return None
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            held = Path(os.readlink(f"/proc/{pid}/fd/{descriptor}").removesuffix(" (deleted)"))
            if held.parent == sandbox.logs:
                return Owned(pid, kind, held.stem)
    except OSError:
        return None
    return None


def _task(pid: int, sandbox: Sandbox) -> Owned | None:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    if f"SLURM_CLUSTER_NAME={sandbox.cluster}".encode() not in environment:
        return None
    mark = b"SLURMD_NODENAME="
    node = next((entry[len(mark) :].decode() for entry in environment if entry.startswith(mark)), None)
    return Owned(pid, "task", node) if node in sandbox.nodes else None


def _first_owned(pid: int, parents: dict[int, int], found: dict[int, Owned]) -> Owned | None:
    while pid in parents:
        if pid in found:
            return found[pid]
        pid = parents[pid]
    return None
