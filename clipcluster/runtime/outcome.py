"""How a rank ends: its exit codes, and the failures that end a run. Standard library only."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import ClassVar, NoReturn

from clipcluster.errors import StaleAttempt, UserError


class Outcome(IntEnum):
    """How a rank ended; the value is its exit code. Never 1, the code of an interpreter that crashed."""

    FINISHED = 0
    STOPPED = 85  # asked to stop, and saved
    ERROR = 86  # an unexpected exception
    LOST_PEERS = 87  # another rank is gone or silent
    STALE = 88  # a later attempt owns the run
    RECIPE = 89
    DATA = 90
    OUT_OF_MEMORY = 91
    NON_FINITE = 92
    CHECKPOINT = 93
    STALLED = 94  # no rank made progress any more; the verdict requeues
    CANCELLED = 130


ADVICE: dict[int, str] = {
    Outcome.ERROR: "The traceback is in attempts/*/rank-*.out; see: clipcluster logs RUN",
    Outcome.RECIPE: "Fix the recipe (clipcluster check RECIPE --deep) and submit it again.",
    Outcome.DATA: "Repair or re-index the shards named (clipcluster shards verify DIR), then submit again.",
    Outcome.OUT_OF_MEMORY: "Ask for more memory (cluster.mem) or more ranks, or train smaller towers, then "
    "submit again.",
    Outcome.NON_FINITE: "Lower optim.lr, lengthen optim.warmup or set optim.clip_norm, then submit again.",
    Outcome.CHECKPOINT: "Check checkpoints/ in the run folder and the free space of its disk, then submit "
    "again.",
}
"""What to do about an ending that ends the run, where whoever found it says nothing better."""


class Failure(Exception):
    """Ends the run for good: `reason` and `advice` go into `outcome.json`, and the code is `outcome`.

    `agreed` says that all ranks raise it together at a step boundary, so that rank 0 writes the outcome.
    """

    outcome: ClassVar[Outcome] = Outcome.ERROR

    def __init__(self, reason: str, advice: str = "", *, agreed: bool = False) -> None:
        super().__init__(reason)
        self.advice = advice
        self.agreed = agreed

    @property
    def reason(self) -> str:
        return str(self)


class RecipeFailure(Failure):
    """The recipe asks for something that cannot be built here."""

    outcome = Outcome.RECIPE


class DataError(Failure):
    """The data is not what it was, is broken beyond the limit, or is missing."""

    outcome = Outcome.DATA


class OutOfMemory(Failure):
    """The device or the host has too little memory for the step."""

    outcome = Outcome.OUT_OF_MEMORY


class NonFiniteError(Failure):
    """Loss or gradients stayed non-finite."""

    outcome = Outcome.NON_FINITE


class CheckpointError(Failure):
    """No checkpoint could be written, or none of those there verifies."""

    outcome = Outcome.CHECKPOINT


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host or the device has no memory left."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


@contextlib.contextmanager
def advising_on_memory(what: str, advice: str) -> Iterator[None]:
    """OutOfMemory with this advice, and `what` was done, where an error inside says that memory ran out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{what}: {error or 'no memory left'}", advice) from error


def described(error: Exception) -> dict[str, str]:
    """An error as it travels between ranks: `name`, `reason` and `advice`, plain text."""
    return {"name": type(error).__name__, "reason": str(error), "advice": getattr(error, "advice", "")}


def restored(description: Mapping[str, str]) -> Exception:
    """The error that another rank described; one of an unexpected kind is a RuntimeError that names it."""
    name, reason = description["name"], description["reason"]
    for failure in Failure.__subclasses__():
        if name == failure.__name__:
            return failure(reason, description["advice"])
    for error in (StaleAttempt, UserError):
        if name == error.__name__:
            return error(reason)
    return RuntimeError(f"{name}: {reason}" if reason else name)


class LostPeers(Exception):
    """Another rank is gone or silent. Never the run's outcome: the rank that ended first has the reason."""


def leave(code: int) -> NoReturn:
    """End the process with `code` at once, whatever threads, handlers and destructors are left.

    Of what the standard library would remove at its exit, the folder of the fork server's socket goes.
    """
    if "multiprocessing.forkserver" in sys.modules:
        from multiprocessing.util import get_temp_dir

        shutil.rmtree(get_temp_dir(), ignore_errors=True)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk must not change the code
            stream.flush()
    os._exit(code)
