"""How a rank ended: its exit code, the attempt's outcome, and the event `fail`."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import traceback

from clipcluster.errors import StaleAttempt, UserError
from clipcluster.runs.attempts import Attempt
from clipcluster.runtime.launch import Launch
from clipcluster.runtime.outcome import ADVICE, Failure, LostPeers, Outcome, is_out_of_memory
from clipcluster.runtime.stop import Stop

# Errors of the program, which the next attempt would repeat: they end the run.
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
_log = logging.getLogger("clipcluster")


def returned(outcome: Outcome, attempt: Attempt, launch: Launch, stop: Stop) -> int:
    """The exit code for an ending that all ranks agreed on: rank 0 makes its outcome, the others wait for it.

    A trainer makes the outcome itself, before its last barrier, with the reason that the ranks agreed on.
    """
    if outcome in (Outcome.FINISHED, Outcome.STOPPED):
        name = outcome.name.lower()
        if launch.rank == 0:
            reason = f"rank 0 got {stop.reason}" if stop.requested and outcome is Outcome.STOPPED else ""
            attempt.end(name, outcome, reason)
        elif attempt.wait_for_outcome(_OUTCOME_WAIT_S) is None:
            # Leaving before rank 0 would let the launcher kill it before the outcome is made.
            _log.warning("rank 0 made no outcome within %g s", _OUTCOME_WAIT_S)
        _log.info("%s at step %s", name, attempt.step)
    elif outcome not in (Outcome.LOST_PEERS, Outcome.STALE):
        reason = f"the trainee returned {outcome.name}"
        attempt.write_outcome(outcome_name="failed", code=outcome, rank=launch.rank, reason=reason)
    return int(outcome)


def raised(error: BaseException, attempt: Attempt, launch: Launch) -> int:
    """The exit code for an exception, its outcome made where it ends the run, its traceback in the log."""
    outcome = _ending(error)
    if outcome is Outcome.STALE:
        _log.warning("%s", error)
        return int(outcome)
    try:
        _record(error, outcome, attempt, launch)
    except StaleAttempt as stale:
        outcome = Outcome.STALE
        _log.warning("%s", stale)
    except OSError as refusal:
        # The folder takes nothing more (a full disk): the code alone tells, and the verdict sees a crash.
        _log.error("the ending could not be recorded: %s", refusal)
    with contextlib.suppress(OSError):
        traceback.print_exception(type(error), error, error.__traceback__)
    return int(outcome)


def _record(error: BaseException, outcome: Outcome, attempt: Attempt, launch: Launch) -> None:
    """Make the outcome at once where `error` ends the run (the peers wait in a collective), then the event.

    The event carries `reason` and `signature`: an error with the same signature at the same step in the next
    attempt is permanent.
    """
    reason = _reason(error)
    if _ends_run(error, outcome):
        if isinstance(error, Failure) and error.agreed and launch.rank != 0:
            attempt.wait_for_outcome(_OUTCOME_WAIT_S)  # rank 0 writes for all ranks
        advice = getattr(error, "advice", "") or ADVICE[outcome]
        attempt.write_outcome(
            outcome_name="failed", code=outcome, rank=launch.rank, reason=reason, advice=advice
        )
    attempt.event(
        "fail",
        writer=f"rank-{launch.rank}",
        outcome=outcome.name.lower(),
        code=int(outcome),
        reason=reason,
        signature=signature(error),
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, (Failure, UserError)):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def signature(error: BaseException) -> str:
    """What `error` says wherever and whenever it is raised: its type and the first line of its message.

    Addresses in memory or the network, and the ids of processes and threads, differ from one attempt to the
    next and are left out.
    """
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {_CHANGING.sub('?', first)[:500]}"


_CHANGING = re.compile(
    r"\b0x[0-9a-fA-F]+\b"
    r"|\[?\b\d{1,3}(?:\.\d{1,3}){3}\b\]?(?::\d+)?"
    r"|(?<=\bpid )\d+|(?<=\bpid=)\d+|(?<=\bprocess )\d+|(?<=\bthread )\d+",
    re.IGNORECASE,
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
    if is_out_of_memory(error):
        return Outcome.OUT_OF_MEMORY
    return Outcome.ERROR


def _ends_run(error: BaseException, outcome: Outcome) -> bool:
    """Whether the next attempt would end the same way."""
    known = isinstance(error, (Failure, UserError, *_PROGRAMMING_ERRORS))
    return outcome is Outcome.OUT_OF_MEMORY or (known and outcome is not Outcome.LOST_PEERS)


def _is_lost_peer(error: BaseException) -> bool:
    if isinstance(error, LostPeers):
        return True
    if "torch.distributed" not in sys.modules:
        return False
    from clipcluster.runtime.world import is_lost_peer

    return is_lost_peer(error)
