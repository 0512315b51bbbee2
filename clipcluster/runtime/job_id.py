"""What a job is called, with a scheduler and without one, and whether a local one still runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def slurm_job_id(environ: Mapping[str, str]) -> str:
    """The job as `scontrol requeue` must be told it: "ARRAYJOB_TASK" for a member of an array.

    A member's plain id would requeue the whole array.
    """
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return environ["SLURM_JOB_ID"]


def local_job_id(pid: int | None = None) -> str:
    """A name for a process (default: this one) where no scheduler names the job: "local-HOST-PID-START".

    START (clock ticks since boot) tells the process from a later one with the same pid.
    """
    pid = os.getpid() if pid is None else pid
    process = _process(pid)
    return f"local-{socket.gethostname()}-{pid}-{process[1] if process else 0}"


def local_job_runs(job_id: str) -> bool | None:
    """Whether the process named by `local_job_id` still runs; None where this machine cannot know."""
    prefix, _, start = job_id.rpartition("-")
    prefix, _, pid = prefix.rpartition("-")
    if prefix != f"local-{socket.gethostname()}" or not pid.isdigit() or not start.isdigit():
        return None
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's process: it runs, and the start time says whether it is the one meant
    process = _process(int(pid))
    if process is None:
        return True  # no /proc here: the pid alone must do
    state, ticks = process
    return state not in "ZX" and int(start) in (0, ticks)


def _process(pid: int) -> tuple[str, int] | None:
    """State and start time (clock ticks since boot): fields 3 and 22 of /proc/PID/stat, proc(5)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            fields = stream.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0].decode(), int(fields[19])
