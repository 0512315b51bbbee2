"""The user's command that is told how an attempt ended: `on_event` of the recipe. Standard library only.

It can neither fail nor hold up a run: it starts after the verdict was recorded and acted on, runs in a
process group of its own, for some seconds at most, and what goes wrong with it is said in the job's log.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from contextlib import suppress

from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from clipcluster.runtime.environment import ATTEMPT
from jobs.endings.log import say
from jobs.endings.verdict import Facts, Verdict

SECONDS = 10.0
PREEMPTED_SECONDS = 2.0  # where somebody waits for the nodes
REASON_CHARACTERS = 1000  # the end of a log may be a reason; a process takes no variable of any length
LOG = "on_event.out"  # in the attempt's folder: what the command printed
TOLD = {"finish": "finished", "fail": "failed", "requeue": "requeued", "stall": "stalled, and requeued"}
"""What is told of, and what it is called in a message."""


def event_of(verdict: Verdict) -> str | None:
    """finish, fail, requeue or stall; None for an ending that nobody is told of (the user's own, say)."""
    action = "requeue" if verdict.action == "note" else verdict.action  # SLURM did it itself
    if action == "requeue" and verdict.ending == "stalled":
        return "stall"
    return action if action in TOLD else None


def start(run: Run, attempt: Attempt, seen: Facts, verdict: Verdict) -> threading.Thread | None:
    """Start the command for this verdict, and a thread that ends with it; None where there is none.

    This process does not leave before the thread does: SLURM ends what a job that has ended left behind.
    """
    event = event_of(verdict)
    if event is None:
        return None
    try:
        command = attempt.settings().get("on_event")
        if not command:
            return None
        # readable by its owner alone: it may hold what the command knows, a token say
        out = os.open(attempt.path / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                env={**os.environ, **_told(run, attempt, seen, verdict, event)},
                cwd=run.path,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        finally:
            os.close(out)
    except Exception as error:  # whatever it is, the run goes its way
        say(f"on_event could not be started: {type(error).__name__}: {error}")
        return None
    seconds = PREEMPTED_SECONDS if verdict.ending == "preempted" else SECONDS
    thread = threading.Thread(target=_watch, args=(process, event, seconds))
    thread.start()
    return thread


def _watch(process: subprocess.Popen[bytes], event: str, seconds: float) -> None:
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        say(f"on_event ({event}) was ended after {seconds:g} s")
        with suppress(subprocess.TimeoutExpired):  # one that waits for a disk outlives even that
            process.wait(1)
        return
    if code:
        say(f"on_event ({event}) ended with code {code}; what it printed is in {LOG} of the attempt")


def _told(run: Run, attempt: Attempt, seen: Facts, verdict: Verdict, event: str) -> dict[str, str]:
    """The command's variables, besides those of the job."""
    step = seen.said.get("step") if seen.said else seen.checkpoint
    reason = " ".join(verdict.reason.replace("\0", " ").split())[:REASON_CHARACTERS]
    message = f"{run.name} {TOLD[event]}" + (f" at step {step:,}" if isinstance(step, int) else "")
    return {
        ATTEMPT: str(attempt.number),
        "CLIPCLUSTER_EVENT": event,
        "CLIPCLUSTER_RUN": run.name,
        "CLIPCLUSTER_RUN_DIR": str(run.path),
        "CLIPCLUSTER_STEP": "" if step is None else str(step),
        "CLIPCLUSTER_REASON": reason,
        "CLIPCLUSTER_MESSAGE": f"{message}: {reason}" if reason else message,
    }
