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
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clipcluster.errors import UserError
from tools.sandbox import processes as processes
from tools.sandbox.config import Sandbox, find_programs, launch_line, plan, slurm_conf
from tools.sandbox.hostname import REFUSED
from tools.slurm import JobState, Node, QueuedJob, SlurmRefused, SlurmUnavailable

POLL_SECONDS = 0.1
# A job that starts again in the second of its end is refused its steps: its nodes revoked it by the second.
SETTLE_SECONDS = 1.5
START_SECONDS = 15  # from a run's submission to the claim of its attempt
BIRTH_SECONDS = 3  # a daemon that holds no log after this long is gone
LOG_LINES = 15
FOLDERS = ("state", "log", "pid")
JOB_ID = re.compile(r"\d+(_\d+)?")


@dataclass(frozen=True)
class Status:
    """What a sandbox is doing: `running` is False when its slurmctld does not answer."""

    sandbox: Sandbox
    running: bool
    nodes: list[Node]
    jobs: list[QueuedJob]


@dataclass(frozen=True)
class Preemption:
    """What became of a job that was preempted; times in seconds since the high-priority job was submitted."""

    job_id: str
    high_job_id: str
    nodes: tuple[str, ...]
    requeued: bool  # False: it ended instead, as `state` says
    state: str
    evicted_after: float  # until the job had left its nodes
    high_started_after: float | None  # until the high-priority job ran on them, if it did
    neighbours: tuple[str, ...]  # other jobs of low that shared a node and were evicted with it


def default_folder() -> Path:
    """$CLIPCLUSTER_SANDBOX, else ./sandbox."""
    return Path(os.environ.get("CLIPCLUSTER_SANDBOX") or "sandbox")


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
    when SLURM is not installed, the folder is in use, or a daemon dies (with the end of its log).
    """
    programs = find_programs()
    folder = Path(os.path.realpath(folder))
    _make_room(folder)
    sandbox = plan(
        folder,
        nodes=nodes,
        cpus=cpus,
        grace_seconds=grace_seconds,
        kill_wait_seconds=kill_wait_seconds,
        user_signal=user_signal,
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
        _await(lambda: _all_idle(sandbox), sandbox, (processes.CONTROL, *sandbox.nodes), deadline)
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


def preempt(folder: Path, job: str | Path, *, come_back: bool = True, hold_seconds: float = 0) -> Preemption:
    """Evict a running job by a real one of higher priority on the same nodes, and let it come back.

    `job` is a job id ("17", "17_3" for a member of an array) or a run folder. The high-priority job holds the
    nodes `hold_seconds` longer than the eviction takes, then ends. Whole nodes are taken: jobs that share one
    go too, and are named. With `come_back` the requeued jobs may start at once instead of about two minutes
    later. A run that was only just submitted is given `START_SECONDS` to claim its attempt. Raises UserError
    when the job is not running in `low`, or has not left its nodes long after the grace time.
    """
    sandbox = find(folder)
    slurm = sandbox.slurm
    before = _job_to_evict(sandbox, job)
    job_id = before.job_id
    neighbours = _neighbours(sandbox, before)
    names = tuple(neighbour.job_id for neighbour in neighbours)
    begin = time.monotonic()
    high = slurm.submit(
        "--partition=high",
        "--exclusive",
        f"--nodes={len(before.nodes)}",
        f"--nodelist={','.join(before.nodes)}",
        "--job-name=preempt",
        "--time=10",
        "--output=/dev/null",
        "--wrap=sleep 600",
    )
    try:
        after = _await_eviction(sandbox, before, begin)
        evicted = time.monotonic() - begin
        for neighbour in neighbours:
            _await_eviction(sandbox, neighbour, begin)
        started = _await_high(sandbox, high, begin)
        time.sleep(hold_seconds)
    finally:
        slurm.cancel([high])
    _await_gone(sandbox, high)
    if come_back:
        for evictee in (before, *neighbours):
            with suppress(UserError):  # it ended instead
                release(folder, evictee.job_id)
    return Preemption(job_id, high, before.nodes, not after.ended, after.state, evicted, started, names)


def release(folder: Path, job: str | Path, *, seconds: float = 10) -> None:
    """Let a requeued job start now instead of about two minutes later; nothing if it has started already.

    Returns once it runs or waits for something else than its begin time, after `seconds` at most. Raises
    UserError if it has ended or is unknown.
    """
    slurm = find(folder).slurm
    job_id = job_of(job)
    deadline = time.monotonic() + seconds
    asked = False
    while True:
        state = slurm.job(job_id)
        if state is None or state.ended:
            raise UserError(
                f"job {job_id} will not run again: {state.state if state else 'unknown to SLURM'}"
            )
        if state.state == "RUNNING" or time.monotonic() > deadline:
            return
        if state.state == "PENDING":
            if asked and state.reason != "BeginTime":
                return
            if not asked:
                time.sleep(SETTLE_SECONDS)
            with suppress(SlurmRefused):  # it started between the two calls
                slurm.release(job_id)
            asked = True
        time.sleep(3 * POLL_SECONDS)


def kill_node(folder: Path, node: str) -> int:
    """SIGKILL everything on a node at once: slurmd, step daemons, tasks; returns how many processes.

    SLURM notices after about 25 s, as it does when a machine loses its power.
    """
    sandbox = find(folder)
    return processes.end(sandbox, node=_known(sandbox, node))


def lose_node(folder: Path, node: str) -> int:
    """SIGKILL a node's slurmd alone: to SLURM the node is gone after about 25 s, its ranks live on."""
    sandbox = find(folder)
    return processes.end(sandbox, node=_known(sandbox, node), kinds=("slurmd",))


def restore_node(folder: Path, node: str, *, seconds: float = 60) -> None:
    """Start a lost node's slurmd again and wait until SLURM can use it; nothing if it runs."""
    sandbox = find(folder)
    _known(sandbox, node)
    running = [p for p in processes.owned(sandbox) if p.kind == "slurmd" and p.node == node]
    if not running:
        _launch(sandbox, find_programs()["slurmd"], "-N", node)
    deadline = time.monotonic() + seconds
    _await(lambda: _usable(sandbox, node), sandbox, (node,), deadline)


def job_of(job: str | Path) -> str:
    """The job id itself, or the job of a run folder's newest attempt; raises UserError for anything else."""
    if JOB_ID.fullmatch(str(job)):
        return str(job)
    from clipcluster.runs.folder import Run

    path = Path(job)
    if not path.is_dir():
        raise UserError(f"{job} is neither a job id (17, or 17_3 for a member of an array) nor a run folder")
    attempt = Run(path).newest()
    if attempt is None or attempt.job is None:
        raise UserError(f"run {path} has not started: no attempt has claimed it yet; try again once it runs")
    return attempt.job


def _make_room(folder: Path) -> None:
    """Refuse a folder that is in use; clear what a sandbox that died has left."""
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
    line = launch_line(sandbox, program, "-f", str(sandbox.conf), *arguments)
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
    if sandbox.own_host_name and done.returncode == REFUSED:
        name = socket.gethostname()
        raise UserError(
            f"this machine's name {name} does not resolve to {sandbox.address}, so SLURM would listen on the "
            "network without authentication, and the system allows no host name of its own to the sandbox. "
            f"Make {name} resolve to {sandbox.address}: a first line `{sandbox.address} {name}` "
            "in /etc/hosts, or, for a container, `--hostname localhost`"
        )
    if done.returncode != 0:
        raise UserError(_obituary(sandbox, f"{Path(program).name} refused to start ({done.returncode})"))


def _await(ready: Callable[[], bool], sandbox: Sandbox, launched: tuple[str, ...], deadline: float) -> None:
    """Wait until it is ready; raises UserError when one of these daemons is gone, or time is up."""
    missing_since: dict[str, float] = {}
    while not ready():
        now = time.monotonic()
        alive = {p.node for p in processes.owned(sandbox) if p.kind in processes.DAEMONS}
        missing_since = {name: missing_since.get(name, now) for name in launched if name not in alive}
        gone = [name for name, since in missing_since.items() if now - since > BIRTH_SECONDS]
        if gone:
            raise UserError(_obituary(sandbox, f"the daemon of {gone[0]} ended while the sandbox started"))
        if now > deadline:
            raise UserError(_obituary(sandbox, "the sandbox was not ready in time"))
        time.sleep(POLL_SECONDS)


def _obituary(sandbox: Sandbox, what: str) -> str:
    """What happened, with the end of each log that has something to say."""
    parts = [what]
    for log in sorted(sandbox.logs.iterdir()) if sandbox.logs.is_dir() else []:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "rror:" in line or "fatal:" in line] or lines
        telling = [line for line in telling if "pmix" not in line.lower()]  # MPI is not used
        if telling:
            parts.append(f"--- {log.name}")
            parts.extend(telling[-LOG_LINES:])
    return "\n".join(parts)


def _listens(sandbox: Sandbox) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((sandbox.address, sandbox.control_port)) == 0


def _all_idle(sandbox: Sandbox) -> bool:
    try:
        nodes = sandbox.slurm.nodes()
    except (SlurmUnavailable, SlurmRefused):
        return False
    return len(nodes) == len(sandbox.nodes) and all(n.state == "idle" and n.responding for n in nodes)


def _usable(sandbox: Sandbox, node: str) -> bool:
    return any(
        found.name == node and found.responding and found.state in ("idle", "mixed", "allocated")
        for found in sandbox.slurm.nodes()
    )


def _cancel_everything(sandbox: Sandbox, patience: float) -> None:
    deadline = time.monotonic() + patience
    slurm = sandbox.slurm
    with suppress(SlurmUnavailable, SlurmRefused):
        slurm.cancel([job.job_id for job in slurm.queue()])
        while (left := slurm.queue()) and time.monotonic() < deadline:
            # A job that requeued itself in its last breath has risen again.
            slurm.cancel([job.job_id for job in left if job.state != "COMPLETING"])
            time.sleep(POLL_SECONDS)


def _known(sandbox: Sandbox, node: str) -> str:
    if node not in sandbox.nodes:
        raise UserError(f"no node {node} in the sandbox; it has {', '.join(sandbox.nodes)}")
    return node


def _running_job(sandbox: Sandbox, job_id: str) -> JobState:
    state = sandbox.slurm.job(job_id)
    if state is None:
        raise UserError(f"the sandbox in {sandbox.folder} knows no job {job_id}")
    if state.state != "RUNNING":
        raise UserError(f"job {job_id} is {state.state}; only a running job can be preempted")
    if state.partition != "low":
        raise UserError(f"job {job_id} runs in partition {state.partition}; only those in low are preempted")
    return state


def _job_to_evict(sandbox: Sandbox, job: str | Path) -> JobState:
    """The running job; where it belongs to a run whose job is only starting, it is waited for."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return _running_job(sandbox, job_of(job))
        except UserError:
            name = Path(os.path.realpath(job)).name
            starting = not JOB_ID.fullmatch(str(job)) and any(
                queued.name == name and queued.state != "COMPLETING" for queued in sandbox.slurm.queue()
            )
            if not starting or time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)


def _neighbours(sandbox: Sandbox, job: JobState) -> list[JobState]:
    """The other running jobs of low on any of the job's nodes."""
    ids = [
        other.job_id
        for other in sandbox.slurm.queue()
        if other.job_id != job.job_id
        and other.partition == "low"
        and other.state == "RUNNING"
        and set(other.nodes) & set(job.nodes)
    ]
    return [state for state in map(sandbox.slurm.job, ids) if state is not None]


def _await_eviction(sandbox: Sandbox, before: JobState, begin: float) -> JobState:
    """Wait until the job has left its nodes; the state it then has: PENDING, or an ended one."""
    limit = sandbox.grace_seconds + sandbox.kill_wait_seconds + 60
    while True:
        state = sandbox.slurm.job(before.job_id)
        if state is None:
            raise UserError(f"SLURM has forgotten job {before.job_id}")
        if state.ended or state.state == "PENDING":
            return state
        if state.restarts > before.restarts and state.state == "RUNNING":
            return state  # requeued and back already, on other nodes
        if time.monotonic() - begin > limit:
            raise UserError(
                f"job {before.job_id} has not left its nodes {limit} s after a job of higher priority "
                f"asked for them: {state.state}, PreemptTime={state.preempt_time}"
            )
        time.sleep(POLL_SECONDS)


def _await_high(sandbox: Sandbox, high: str, begin: float, seconds: float = 15) -> float | None:
    """Seconds from `begin` until the high-priority job runs; None if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = sandbox.slurm.job(high)
        if state is None or state.ended:
            return None
        if state.state == "RUNNING":
            return time.monotonic() - begin
        time.sleep(POLL_SECONDS)
    return None


def _await_gone(sandbox: Sandbox, job_id: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while sandbox.slurm.queue(job_ids=[job_id]) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
