"""The attempt of this process: the one that the batch script claimed, or one that rank 0 claims for all."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from clipcluster.errors import UserError
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import AlreadyOwned, Run
from clipcluster.runtime.environment import ATTEMPT, TAKE_OVER
from clipcluster.runtime.launch import Launch, whole_number
from clipcluster.runtime.network import listen


def open_attempt(run: Run, launch: Launch, still_running: Callable[[str], bool]) -> Attempt | None:
    """This process's attempt; None where the run is finished already."""
    if not run.exists():
        raise UserError(
            f"{run.path} is not a run folder: it has no recipe.yaml. Create one with: "
            "clipcluster submit RECIPE --executor none"
        )
    given = os.environ.get(ATTEMPT)
    if given:
        if not given.isdecimal():
            raise UserError(f"{ATTEMPT} is {given!r}; it must be the number of an attempt of {run.name}.")
        attempt = run.attempt(int(given))
        if launch.manager == "slurm" and attempt.job != launch.job_id:
            raise UserError(
                f"{ATTEMPT} is {given}, which job {attempt.job} claimed; this is job {launch.job_id}. "
                "Start jobs with: clipcluster submit"
            )
        return attempt
    if launch.manager in ("slurm", "local"):
        raise UserError(
            f"{ATTEMPT} is not set, and only the batch script may claim an attempt for a whole job. "
            "Start jobs with: clipcluster submit"
        )
    if launch.size == 1:
        return _claim(run, launch, still_running)
    return _claim_together(run, launch, still_running)


def _claim(run: Run, launch: Launch, still_running: Callable[[str], bool]) -> Attempt | None:
    """Claim for a launcher that restarts nothing; None where the run is finished already."""
    if run.finished():
        return None
    taken_over = os.environ.get(TAKE_OVER)

    def runs(job_id: str) -> bool:
        newest = run.newest()
        ended = newest is not None and newest.outcome() is not None
        return not ended and job_id != taken_over and still_running(job_id)

    try:
        return run.claim(launch.job_id, host=socket.gethostname(), still_running=runs)
    except AlreadyOwned as error:
        raise UserError(f"{error}. If you know that it has ended, set {TAKE_OVER}={error.job_id}") from error


def _claim_together(run: Run, launch: Launch, still_running: Callable[[str], bool]) -> Attempt | None:
    """Under torchrun: rank 0 claims and tells the others the number through torchrun's store."""
    try:
        store = _torchrun_store(launch)
        key = f"clipcluster/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/attempt"
        if launch.rank:
            told = store.get(key).decode()
            if store.add(f"{key}/readers", 1) == launch.size - 1:
                store.set(f"{key}/read", "all")
            return _told(run, told)
        try:
            attempt = _claim(run, launch, still_running)
        except UserError:
            store.set(key, "refused")
            store.wait([f"{key}/read"])
            raise
        store.set(key, str(attempt.number) if attempt else "finished")
        store.wait([f"{key}/read"])  # where rank 0 holds the store, it must outlive the others' reading
        return attempt
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"Rank {launch.rank} of {launch.size} could not reach the other ranks at {address}: {error}"
        ) from error


def _told(run: Run, told: str) -> Attempt | None:
    if told == "refused":
        raise UserError(f"Rank 0 could not claim {run.name}; its message says why.")
    return None if told == "finished" else run.attempt(int(told))


def _torchrun_store(launch: Launch) -> Any:
    """The store at MASTER_ADDR:MASTER_PORT, held by torchrun's agent, or by rank 0 without one."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {launch.size}, but {' and '.join(missing)} is not set: start with torchrun."
        )
    from datetime import timedelta

    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], whole_number(os.environ, "MASTER_PORT")
    is_master = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return TCPStore(
        address,
        port,
        is_master=is_master,
        timeout=timedelta(seconds=300),
        wait_for_workers=False,
        # Left to itself the store would listen on every address of the machine.
        master_listen_fd=_listen(address, port).detach() if is_master else None,
    )


def _listen(address: str, port: int) -> socket.socket:
    try:
        return listen(address, port)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"Rank 0 cannot listen on MASTER_ADDR:MASTER_PORT, {address}:{port}: {error}. Set MASTER_ADDR to "
            f"an address of rank 0's machine ({socket.gethostname()}) and MASTER_PORT to a free port."
        ) from error
