"""Which processes belong to a sandbox, known by what they hold and carry, never by their names alone.

A daemon or step daemon holds one of the sandbox's log files open. A task carries the sandbox's unique
cluster name and its node's name in its environment, which only slurmd puts there. Descendants of either
belong too. So a shell that merely has SLURM_CONF set is never touched.
"""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tools.sandbox.config import DAEMONS, Sandbox

if TYPE_CHECKING:
    import psutil

CONTROL = "slurmctld"


class Owned(NamedTuple):
    """A process of the sandbox."""

    pid: int
    kind: str  # slurmctld, slurmd, slurmstepd or task
    node: str  # "n1", …; "slurmctld" for what belongs to no node


def owned(sandbox: Sandbox) -> list[Owned]:
    """All living processes of the sandbox; zombies are dead."""
    import psutil  # here: the other verbs of the command need none of it

    children: dict[int, list[int]] = defaultdict(list)
    found: dict[int, Owned] = {}
    for pid in psutil.pids():
        with suppress(psutil.Error, OSError):  # it has ended, or is another user's
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            children[process.ppid()].append(pid)
            its = _daemon(process, sandbox) or _task(process, sandbox)
            if its is not None:
                found[pid] = its
    mine = list(found.values())
    for parent in mine:  # grows meanwhile
        for pid in children[parent.pid]:
            if pid not in found:
                # What slurmd starts and holds no log yet is a step daemon on its way.
                found[pid] = Owned(pid, "task", parent.node)
                mine.append(found[pid])
    found.pop(os.getpid(), None)
    return sorted(found.values())


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
            process.pid
            for process in owned(sandbox)
            if (node is None or process.node == node) and (not kinds or process.kind in kinds)
        ]
        quiet = 0 if left else quiet + 1
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ended.update(left)
        if left and time.monotonic() > deadline:
            raise TimeoutError(f"still alive after SIGKILL: {', '.join(map(str, left))}")
        time.sleep(0.02)
    return len(ended)


def control_is_alive(sandbox: Sandbox) -> bool:
    """Whether the sandbox's slurmctld runs."""
    return any(process.kind == CONTROL for process in owned(sandbox))


def _daemon(process: psutil.Process, sandbox: Sandbox) -> Owned | None:
    program = Path(process.exe()).name  # slurmd, slurmd-wlm, …
    for kind in (*DAEMONS, "slurmstepd"):
        if program.startswith(kind):
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                held = Path(os.readlink(descriptor).removesuffix(" (deleted)"))
                if held.parent == sandbox.logs:
                    return Owned(process.pid, kind, held.stem)
    return None


def _task(process: psutil.Process, sandbox: Sandbox) -> Owned | None:
    carried = process.environ()
    node = carried.get("SLURMD_NODENAME")
    if carried.get("SLURM_CLUSTER_NAME") != sandbox.cluster or node not in sandbox.nodes:
        return None
    return Owned(process.pid, "task", node)
