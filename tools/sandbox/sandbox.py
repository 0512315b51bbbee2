"""A throwaway SLURM cluster of several nodes on this machine, for any user, without root or munge.

One slurmctld and one slurmd a node, all on a loopback address with ports of their own, in a folder of its
own; an installed SLURM is neither read nor touched. Two partitions over the same nodes: `low` (default,
preemptible) and `high`, whose jobs evict those of `low`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clipcluster.errors import UserError
from tools.sandbox import hostname, processes
from tools.sandbox.config import (
    DAEMONS,
    LOOPBACK,
    Sandbox,
    find_programs,
    first_job,
    free_ports,
    listens_on_loopback,
    slurm_conf,
    spool_of,
)
from tools.slurm import Node, QueuedJob, SlurmRefused, SlurmUnavailable

POLL_SECONDS = 0.1
APPEAR_SECONDS = 3  # a daemon that holds no log after this long is gone
LOG_LINES = 15
FOLDERS = ("state", "log", "pid")


@dataclass(frozen=True)
class Status:
    """What a sandbox is doing: `running` is False when its slurmctld does not answer."""

    sandbox: Sandbox
    running: bool
    nodes: list[Node]
    jobs: list[QueuedJob]


def start(
    folder: Path,
    *,
    nodes: int = 4,
    cpus: int = 4,
    grace_seconds: int = 10,
    kill_wait_seconds: int = 5,
    user_signal: bool = False,
    seconds: float = 60,
) -> Sandbox:
    """Start a cluster in this folder and wait until all its nodes are idle, at most `seconds`.

    `cpus` is what each node claims to have; `grace_seconds` is the low partition's GraceTime,
    `kill_wait_seconds` the cluster's KillWait; `user_signal` sets preempt_send_user_signal. Raises UserError
    when SLURM is not installed, the folder is in use, or a daemon ends (with the end of its log).
    """
    programs = find_programs()
    folder = Path(os.path.realpath(folder))
    _clear(folder)
    sandbox = Sandbox(
        folder=folder,
        node_count=nodes,
        cpus=cpus,
        grace_seconds=grace_seconds,
        kill_wait_seconds=kill_wait_seconds,
        user_signal=user_signal,
        cluster=f"sandbox_{os.urandom(6).hex()}",
        port=free_ports(nodes + 1),
        spool=spool_of(folder),
        own_host_name=not listens_on_loopback(),
        first_job=first_job(),
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    sandbox.write()
    try:
        for name in FOLDERS:
            (folder / name).mkdir(mode=0o700)
        for node in sandbox.nodes:
            (sandbox.spool / node).mkdir(parents=True, mode=0o700)
        sandbox.conf.write_text(slurm_conf(sandbox))
        (folder / "plugstack.conf").touch()
        deadline = time.monotonic() + seconds
        _launch(sandbox, programs["slurmctld"], "-c")
        _await(lambda: _listens(sandbox), sandbox, (processes.CONTROL,), deadline)
        for node in sandbox.nodes:
            _launch(sandbox, programs["slurmd"], "-N", node)
        _await(
            lambda: _usable(sandbox, sandbox.nodes), sandbox, (processes.CONTROL, *sandbox.nodes), deadline
        )
    except BaseException:
        stop(folder, patience=0)
        raise
    return sandbox


def stop(folder: Path, *, keep_logs: bool = False, patience: float = 15) -> int:
    """End everything the sandbox of this folder started and remove the folder; returns the processes killed.

    Jobs are cancelled first and given up to `patience` seconds to end by themselves, so that runs are marked
    cancelled and not lost; 0 skips that. With `keep_logs` the folder keeps `log/` alone. Does nothing, and
    raises nothing, when there is no sandbox (any more).
    """
    folder = Path(os.path.realpath(folder))
    sandbox = Sandbox.read(folder)
    if sandbox is None:
        return 0
    if patience > 0 and processes.control_is_alive(sandbox):
        _cancel_everything(sandbox, patience)
    ended = processes.end(sandbox)
    if sandbox.spool.parent != folder:
        shutil.rmtree(sandbox.spool, ignore_errors=True)
    if keep_logs:
        for entry in folder.iterdir():
            if entry.name != sandbox.logs.name:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    else:
        shutil.rmtree(folder)
    return ended


def find(folder: Path) -> Sandbox:
    """The sandbox of this folder; raises UserError if there is none."""
    folder = Path(os.path.realpath(folder))
    sandbox = Sandbox.read(folder)
    if sandbox is None:
        raise UserError(
            f"no sandbox in {folder}; start one with `clipcluster sandbox start`, "
            "or name its folder (default: $CLIPCLUSTER_SANDBOX, else ./sandbox)"
        )
    return sandbox


def status(folder: Path) -> Status:
    """The sandbox's nodes and jobs; raises UserError if there is no sandbox in the folder."""
    sandbox = find(folder)
    try:
        return Status(sandbox, True, sandbox.slurm.nodes(), sandbox.slurm.queue())
    except (SlurmUnavailable, SlurmRefused):
        return Status(sandbox, False, [], [])


def kill_node(folder: Path, node: str) -> int:
    """SIGKILL everything on a node at once: slurmd, step daemons, tasks; returns how many processes.

    SLURM notices after about 25 s, as it does when a machine loses its power.
    """
    return processes.end(_with_node(folder, node), node=node)


def lose_node(folder: Path, node: str) -> int:
    """SIGKILL a node's slurmd alone: to SLURM the node is gone after about 25 s, its ranks keep running."""
    return processes.end(_with_node(folder, node), node=node, kinds=("slurmd",))


def restore_node(folder: Path, node: str, *, seconds: float = 60) -> None:
    """Start a lost node's slurmd again and wait until SLURM can use it; nothing if it runs."""
    sandbox = _with_node(folder, node)
    if not any(p.kind == "slurmd" and p.node == node for p in processes.owned(sandbox)):
        _launch(sandbox, find_programs()["slurmd"], "-N", node)
    _await(lambda: _usable(sandbox, [node]), sandbox, (node,), time.monotonic() + seconds)


def _with_node(folder: Path, node: str) -> Sandbox:
    """The sandbox of this folder; UserError if there is none, or it has no such node."""
    sandbox = find(folder)
    if node not in sandbox.nodes:
        raise UserError(f"no node {node} in the sandbox; it has {', '.join(sandbox.nodes)}")
    return sandbox


def _clear(folder: Path) -> None:
    """Refuse a folder that is in use or misnamed; remove what a sandbox that was killed has left."""
    if not re.fullmatch(r"[\w./+-]+", str(folder), re.ASCII):
        raise UserError(
            f"the sandbox folder {folder} has characters that SLURM's files cannot hold; "
            "give a folder of plain letters, digits and . _ - +"
        )
    old = Sandbox.read(folder)
    if old is not None:
        if processes.control_is_alive(old):
            raise UserError(
                f"a sandbox runs in {folder} already; stop it with `clipcluster sandbox stop`, "
                "or give another folder"
            )
        stop(folder, patience=0)
    if folder.exists() and (not folder.is_dir() or set(os.listdir(folder)) - {"log"}):
        raise UserError(
            f"{folder} exists and holds no sandbox; stopping removes the folder, so give one of its own"
        )
    shutil.rmtree(folder / "log", ignore_errors=True)


def _launch(sandbox: Sandbox, program: str, *arguments: str) -> None:
    """Start a daemon, which puts itself into the background; raises UserError if it refuses at once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    line = [program, "-f", str(sandbox.conf), *arguments]
    if sandbox.own_host_name:
        line = [sys.executable, hostname.__file__, *line]
    output = sandbox.logs / f"{Path(program).name}.out"
    with output.open("ab") as stream:
        done = subprocess.run(
            line,
            env={**kept, **sandbox.environment},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            cwd=sandbox.folder,
            start_new_session=True,
            timeout=60,
        )
    if sandbox.own_host_name and done.returncode == hostname.REFUSED:
        name = socket.gethostname()
        raise UserError(
            f"this machine's name {name} does not resolve to {LOOPBACK}, so SLURM would listen on the "
            "network without authentication, and the system allows no host name of its own to the sandbox. "
            f"Make {name} resolve to {LOOPBACK}: a first line `{LOOPBACK} {name}` "
            "in /etc/hosts, or, for a container, `--hostname localhost`"
        )
    if done.returncode != 0:
        raise UserError(_with_logs(sandbox, f"{Path(program).name} refused to start ({done.returncode})"))


def _await(ready: Callable[[], bool], sandbox: Sandbox, launched: tuple[str, ...], deadline: float) -> None:
    """Wait until it is ready; raises UserError when one of these daemons is gone, or time is up."""
    missing_since: dict[str, float] = {}
    while not ready():
        now = time.monotonic()
        alive = {p.node for p in processes.owned(sandbox) if p.kind in DAEMONS}
        missing_since = {name: missing_since.get(name, now) for name in launched if name not in alive}
        gone = [name for name, since in missing_since.items() if now - since > APPEAR_SECONDS]
        if gone:
            raise UserError(_with_logs(sandbox, f"the daemon of {gone[0]} ended while the sandbox started"))
        if now > deadline:
            raise UserError(_with_logs(sandbox, "the sandbox was not ready in time"))
        time.sleep(POLL_SECONDS)


def _with_logs(sandbox: Sandbox, what: str) -> str:
    """What happened, with the end of each log that has something to say."""
    parts = [what]
    for log in sorted(sandbox.logs.iterdir()) if sandbox.logs.is_dir() else []:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        relevant = [line for line in lines if "rror:" in line or "fatal:" in line] or lines
        relevant = [line for line in relevant if "pmix" not in line.lower()]  # MPI is not used
        if relevant:
            parts.append(f"--- {log.name}")
            parts.extend(relevant[-LOG_LINES:])
    return "\n".join(parts)


def _listens(sandbox: Sandbox) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOOPBACK, sandbox.port)) == 0


def _usable(sandbox: Sandbox, nodes: Sequence[str]) -> bool:
    """Whether SLURM can start jobs on these nodes."""
    try:
        known = sandbox.slurm.nodes()
    except (SlurmUnavailable, SlurmRefused):
        return False
    states = ("idle", "mixed", "allocated")
    return set(nodes) <= {node.name for node in known if node.responding and node.state in states}


def _cancel_everything(sandbox: Sandbox, patience: float) -> None:
    deadline = time.monotonic() + patience
    slurm = sandbox.slurm
    with suppress(SlurmUnavailable, SlurmRefused):
        slurm.cancel([job.job_id for job in slurm.queue()])
        while (left := slurm.queue()) and time.monotonic() < deadline:
            # A job that requeued itself while it ended is back in the queue.
            slurm.cancel([job.job_id for job in left if job.state != "COMPLETING"])
            time.sleep(POLL_SECONDS)
