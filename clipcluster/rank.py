"""One rank of a run: opens its attempt, keeps its log, runs the trainee, and says how it ended.

Nothing here loads torch, so that a trainee without torch ends by the same rules as a training.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipcluster.errors import StaleAttempt, UserError
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import AlreadyOwned, Run
from clipcluster.runtime import logs
from clipcluster.runtime.place import Place, local_job_runs
from clipcluster.runtime.stop import Failure, LostPeers, Outcome, Stop

ATTEMPT = "CLIPCLUSTER_ATTEMPT"  # the attempt that the batch script claimed for this job
TAKE_OVER = "CLIPCLUSTER_TAKE_OVER"  # a job id that the user knows to have ended

# Mistakes of the program: the next attempt would make the same one, so it ends the run.
_PROGRAMMING_ERRORS = (
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    IndexError,
    NameError,
    AssertionError,
    NotImplementedError,
)
_OUTCOME_WAIT_S = 10.0  # how long the other ranks wait for rank 0 to make the outcome

Trainee = Callable[[Run, Attempt, Place, Stop], Outcome]
_log = logging.getLogger(logs.NAME)


def serve(
    run_dir: Path | str,
    trainee: str,
    stop: Stop,
    *,
    still_running: Callable[[str], bool] | None = None,
) -> int:
    """Run `trainee` ("package.module:function") as this process's rank of the run; returns the exit code.

    The trainee is called with (run, attempt, place, stop) and returns how it ended. Standard output and error
    go to `attempts/N/rank-R.out` from the claim on, those of C libraries and child processes too. The event
    `start` is written before the trainee is imported.

    The attempt is $CLIPCLUSTER_ATTEMPT where the batch script claimed it. Under torchrun, or alone, rank 0
    claims and tells the others (`still_running` says whether another job still runs; by default this
    machine's processes are asked). The caller flushes its streams and leaves through `os._exit` with the
    code: 2 where the run cannot be joined, else a value of `Outcome`.
    """
    run = Run(run_dir)
    try:
        place = Place.from_environment()
        attempt = _open_attempt(run, place, still_running or _runs_here)
    except UserError as error:
        print(f"clipcluster: {error}", file=sys.stderr, flush=True)
        return 2
    if attempt is None:
        print(f"{run.name} is finished already: nothing to do", flush=True)
        return int(Outcome.FINISHED)
    writer = f"rank-{place.rank}"
    terminal = _announce(run, attempt) if ATTEMPT not in os.environ and place.rank == 0 else None
    try:
        attempt.check()
        _redirect(attempt.path / f"{writer}.out")
        logs.setup(place.rank, sys.stdout)
        attempt.event("start", writer=writer, rank=place.rank, host=socket.gethostname(), pid=os.getpid())
        outcome = _load(trainee)(run, attempt, place, stop)
        code = _returned(Outcome(outcome), attempt, place)
    except BaseException as error:
        code = _raised(error, attempt, place)
    if terminal is not None:
        _say_ending(terminal, run, attempt, code)
    return code


def _announce(run: Run, attempt: Attempt) -> int:
    """Say where the output of a run started by hand goes; a descriptor that stays where this was said."""
    print(f"{run.name}: attempt {attempt.number}; to follow it: clipcluster logs -f {run.path}", flush=True)
    return os.dup(1)


def _say_ending(terminal: int, run: Run, attempt: Attempt, code: int) -> None:
    """One line on the terminal that a run was started from: how it ended, why, and what to do."""
    made = attempt.outcome() or {"outcome": f"ended with {code}"}
    said = "; ".join(filter(None, (made.get("reason"), made.get("advice"))))
    line = f"{run.name}: {made['outcome']} at step {attempt.step}" + (f" ({said})" if said else "") + "\n"
    with contextlib.suppress(OSError):  # the terminal may have gone
        os.write(terminal, line.encode(errors="replace"))
    os.close(terminal)


def _open_attempt(run: Run, place: Place, still_running: Callable[[str], bool]) -> Attempt | None:
    """This process's attempt; None where the run is finished already."""
    if not run.exists():
        raise UserError(
            f"{run.path} is no run folder: it has no recipe.yaml. Make one with: "
            "clipcluster submit RECIPE --executor none"
        )
    given = os.environ.get(ATTEMPT)
    if given:
        if not given.isdecimal():
            raise UserError(f"{ATTEMPT} is {given!r}; it must be the number of an attempt of {run.name}.")
        attempt = run.attempt(int(given))
        if place.manager == "slurm" and attempt.job != place.job_id:
            raise UserError(
                f"{ATTEMPT} is {given}, which job {attempt.job} claimed; this is job {place.job_id}. "
                "Start jobs with: clipcluster submit"
            )
        return attempt
    if place.manager in ("slurm", "local"):
        raise UserError(
            f"{ATTEMPT} is not set, and only the batch script may claim an attempt for a whole job. "
            "Start jobs with: clipcluster submit"
        )
    if place.size == 1:
        return _claim(run, place, still_running)
    return _claim_together(run, place, still_running)


def _claim(run: Run, place: Place, still_running: Callable[[str], bool]) -> Attempt | None:
    """Claim for a launcher that restarts nothing; None where the run is finished already."""
    if run.finished():
        return None
    taken_over = os.environ.get(TAKE_OVER)

    def runs(job_id: str) -> bool:
        newest = run.newest()
        ended = newest is not None and newest.outcome() is not None
        return not ended and job_id != taken_over and still_running(job_id)

    try:
        return run.claim(place.job_id, host=socket.gethostname(), still_running=runs)
    except AlreadyOwned as error:
        raise UserError(f"{error}. Where you know that it has ended: {TAKE_OVER}={error.job_id}") from error


def _runs_here(job_id: str) -> bool:
    """Whether a process of this machine still runs; a job that it cannot know of counts as running."""
    return local_job_runs(job_id) is not False


def _claim_together(run: Run, place: Place, still_running: Callable[[str], bool]) -> Attempt | None:
    """Under torchrun: rank 0 claims and tells the others the number through torchrun's store."""
    try:
        store = _torchrun_store(place)
        key = f"clipcluster/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/attempt"
        if place.rank:
            told = store.get(key).decode()
            if store.add(f"{key}/readers", 1) == place.size - 1:
                store.set(f"{key}/read", "all")
            return _told(run, told)
        try:
            attempt = _claim(run, place, still_running)
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
            f"Rank {place.rank} of {place.size} did not meet the others at {address}: {error}"
        ) from error


def _told(run: Run, told: str) -> Attempt | None:
    if told == "refused":
        raise UserError(f"Rank 0 could not claim {run.name}; it says why.")
    return None if told == "finished" else run.attempt(int(told))


def _torchrun_store(place: Place) -> Any:
    """The store at MASTER_ADDR:MASTER_PORT, held by torchrun's agent, or by rank 0 without one."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {place.size}, but {' and '.join(missing)} is not set: start with torchrun."
        )
    from datetime import timedelta

    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_master = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    listener = None
    if is_master and address in ("127.0.0.1", "localhost"):
        # Left to itself the store would listen on every address of the machine.
        listener = socket.create_server(("127.0.0.1", port), backlog=4096).detach()
    return TCPStore(
        address,
        port,
        is_master=is_master,
        timeout=timedelta(seconds=300),
        wait_for_workers=False,
        master_listen_fd=listener,
    )


def _redirect(path: Path) -> None:
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


def _load(trainee: str) -> Trainee:
    module, _, function = trainee.partition(":")
    loaded: Trainee = getattr(importlib.import_module(module), function)
    return loaded


def _returned(outcome: Outcome, attempt: Attempt, place: Place) -> int:
    """An ending that all ranks agreed on: rank 0 makes the outcome, the others leave after it."""
    if outcome in (Outcome.FINISHED, Outcome.STOPPED):
        name = outcome.name.lower()
        if place.rank == 0:
            # A trainer makes the outcome itself, before its last barrier; then this makes none.
            if _write_outcome(attempt, place, name, outcome, go_on=outcome is Outcome.STOPPED):
                attempt.event("finish" if outcome is Outcome.FINISHED else "stop", writer="rank-0")
        elif attempt.wait_for_outcome(_OUTCOME_WAIT_S) is None:
            # Leaving before rank 0 would let the launcher kill it before the outcome is made.
            _log.warning("rank 0 made no outcome within %g s", _OUTCOME_WAIT_S)
        _log.info("%s at step %s", name, attempt.step)
    elif outcome not in (Outcome.LOST_PEERS, Outcome.STALE):
        _write_outcome(attempt, place, "failed", outcome, reason=f"the trainee returned {outcome.name}")
    return int(outcome)


def _raised(error: BaseException, attempt: Attempt, place: Place) -> int:
    """The exit code for an exception, its outcome made where it ends the run, its traceback in the log."""
    outcome = _ending(error)
    if outcome is Outcome.STALE:
        _log.warning("%s", error)
        return int(outcome)
    try:
        _record(error, outcome, attempt, place)
    except StaleAttempt as stale:
        outcome = Outcome.STALE
        _log.warning("%s", stale)
    except OSError as refusal:
        # The folder takes nothing more (a full disk): the code alone tells, and the verdict sees a crash.
        _log.error("the ending could not be written down: %s", refusal)
    with contextlib.suppress(OSError):
        traceback.print_exception(type(error), error, error.__traceback__)
    return int(outcome)


def _record(error: BaseException, outcome: Outcome, attempt: Attempt, place: Place) -> None:
    """Make the outcome at once where `error` ends the run (the peers sit in a collective), then the event."""
    ends_run, reason, advice = _explain(error, outcome)
    if ends_run:
        if isinstance(error, Failure) and error.agreed and place.rank != 0:
            attempt.wait_for_outcome(_OUTCOME_WAIT_S)  # rank 0 speaks for all
        _write_outcome(attempt, place, "failed", outcome, reason=reason, advice=advice)
    attempt.event(
        "fail", writer=f"rank-{place.rank}", outcome=outcome.name.lower(), code=int(outcome), reason=reason
    )


def _ending(error: BaseException) -> Outcome:
    if isinstance(error, StaleAttempt):
        return Outcome.STALE
    if isinstance(error, Failure):
        return error.outcome
    if isinstance(error, UserError):
        return Outcome.RECIPE
    if _is_lost_peer(error):
        return Outcome.LOST_PEERS
    if _is_out_of_memory(error):
        return Outcome.OUT_OF_MEMORY
    return Outcome.ERROR


def _explain(error: BaseException, outcome: Outcome) -> tuple[bool, str, str]:
    """Whether `error` ends the run for good, with the reason and an advice for the user."""
    if isinstance(error, Failure):
        return True, error.reason, error.advice
    if isinstance(error, UserError):
        return True, str(error), ""
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if outcome is Outcome.OUT_OF_MEMORY:
        return True, reason, "Set a smaller train.micro_batch, or ask for more memory (cluster.mem)."
    if outcome is Outcome.ERROR and isinstance(error, _PROGRAMMING_ERRORS):
        return True, reason, "The rank's log holds the traceback (clipcluster logs RUN --rank R)."
    return False, reason, ""


def _is_lost_peer(error: BaseException) -> bool:
    if isinstance(error, LostPeers):
        return True
    if "torch.distributed" not in sys.modules:
        return False
    from clipcluster.runtime.world import is_lost_peer

    return is_lost_peer(error)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def _write_outcome(
    attempt: Attempt,
    place: Place,
    name: str,
    outcome: Outcome,
    *,
    reason: str = "",
    advice: str = "",
    go_on: bool = False,
) -> bool:
    return attempt.write_outcome(
        outcome_name=name,
        code=int(outcome),
        rank=place.rank,
        host=socket.gethostname(),
        reason=reason,
        advice=advice,
        go_on=go_on,
    )
