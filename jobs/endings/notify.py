"""The user's command that is told how an attempt ended: `on_event` of the recipe. Standard library only.

It can neither fail nor hold up a run: it runs in a process group of its own, for `SECONDS` at most, and what
goes wrong with it is said in the job's log and nothing more.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from contextlib import suppress

from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from jobs.endings.log import say
from jobs.endings.verdict import Facts, Verdict

SECONDS = 10.0
LOG = "on_event.out"  # in the attempt's folder: what the command printed
TOLD = {"finish": "finished", "fail": "failed", "requeue": "requeued", "stall": "stalled, and requeued"}
"""What is told of, and what it is called in a message."""


def event_of(verdict: Verdict) -> str | None:
    """finish, fail, requeue or stall; None for an ending that nobody is told of (the user's own, say)."""
    if verdict.action == "requeue" and verdict.ending == "stalled":
        return "stall"
    return verdict.action if verdict.action in TOLD else None


def start(run: Run, attempt: Attempt, seen: Facts, verdict: Verdict) -> threading.Thread | None:
    """Start the command for this verdict, and a thread that ends with it; None where there is none."""
    event = event_of(verdict)
    if event is None:
        return None
    try:
        command = attempt.settings().get("on_event")
        if not command:
            return None
        with (attempt.path / LOG).open("ab") as out:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                env={**os.environ, **_told(run, attempt, seen, verdict, event)},
                cwd=run.path,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
    except Exception as error:  # whatever it is, the run goes its way
        say(f"on_event could not be started: {type(error).__name__}: {error}")
        return None
    thread = threading.Thread(target=_watch, args=(process, event), daemon=True)
    thread.start()
    return thread


def wait(thread: threading.Thread | None) -> None:
    """Wait for a command that was started: a job that leaves takes its processes with it."""
    if thread is not None:
        thread.join(SECONDS + 1)


def _watch(process: subprocess.Popen[bytes], event: str) -> None:
    try:
        code = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        say(f"on_event ({event}) was ended after {SECONDS:g} s")
        process.wait()
        return
    if code:
        say(f"on_event ({event}) ended with code {code}; what it printed is in {LOG} of the attempt")


def _told(run: Run, attempt: Attempt, seen: Facts, verdict: Verdict, event: str) -> dict[str, str]:
    """The command's variables, besides those of the job."""
    step = seen.said.get("step") if seen.said else seen.checkpoint
    reason = " ".join(verdict.reason.split())
    message = f"{run.name} {TOLD[event]}" + (f" at step {step:,}" if isinstance(step, int) else "")
    return {
        "CLIPCLUSTER_EVENT": event,
        "CLIPCLUSTER_RUN": run.name,
        "CLIPCLUSTER_RUN_DIR": str(run.path),
        "CLIPCLUSTER_STEP": "" if step is None else str(step),
        "CLIPCLUSTER_REASON": reason,
        "CLIPCLUSTER_MESSAGE": f"{message}: {reason}" if reason else message,
    }
