"""Where processes are, for a log: Python frames always, native ones where py-spy is installed. No torch.

Everything is written to descriptor 2 and works while the interpreter's own threads are stuck.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import psutil

ON_REQUEST = signal.SIGQUIT
"""Makes a process that called `dump_on_request` write its stacks."""
PY_SPY_SECONDS = 20.0
_PR_SET_PTRACER, _ANYBODY = 0x59616D61, -1  # linux/prctl.h


def dump_on_request() -> None:
    """Let `ON_REQUEST` write the stacks of this process, also while it waits in the kernel."""
    faulthandler.register(ON_REQUEST, file=2, all_threads=True)


def allow_py_spy() -> None:
    """Let other processes of this user look into this one, where the kernel asks for it (Yama)."""
    if _py_spy():
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANYBODY, 0, 0, 0)


def dump_stacks() -> None:
    """The stacks of all threads of this process and of its workers, to descriptor 2."""
    faulthandler.dump_traceback(file=2, all_threads=True)
    for pid in _workers():
        _say(describe(pid))
        if _listens(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, ON_REQUEST)
            time.sleep(0.1)  # one after the other


def dump_native() -> None:
    """The same with native frames, where py-spy is installed; it may take its time."""
    for pid in (os.getpid(), *_workers()):
        look_into(pid, "--native")


def _workers() -> list[int]:
    return [worker.pid for worker in multiprocessing.active_children() if worker.pid]


def _listens(pid: int) -> bool:
    """Whether a process called `dump_on_request`: any other would be killed."""
    try:
        with open(f"/proc/{pid}/status") as stream:
            caught = next(line for line in stream if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return False
    return bool(int(caught.split()[1], 16) >> (ON_REQUEST - 1) & 1)


def look_into(pid: int, *options: str) -> None:
    """What py-spy sees of a process, to descriptor 2; nothing where it is not installed."""
    program = _py_spy()
    if program is None:
        return
    command = [*program, "dump", "--pid", str(pid), *options]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PY_SPY_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _say(f"py-spy says nothing of process {pid}: {error}")
        return
    _say(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _py_spy() -> list[str] | None:
    beside = os.path.join(os.path.dirname(sys.executable), "py-spy")
    found = shutil.which("py-spy") or shutil.which(beside)
    return [found] if found else None


def describe(pid: int) -> str:
    """A process in one line: whether it runs, sleeps, waits for a disk, or was stopped."""
    try:
        process = psutil.Process(pid)
        state, name = process.status(), " ".join(process.cmdline())[:160]
    except psutil.Error as error:
        return f"process {pid}: {error}"
    where = ""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/wchan") as stream:
        where = stream.read().strip("0\n")
    return f"process {pid} is {state}{f' in {where}' if where else ''}: {name}"


def flight_records() -> dict[str, Any]:
    """What torch.distributed's flight recorders hold of the last collectives, by backend; only where used.

    torch 2.8 and newer record by default; TORCH_FR_BUFFER_SIZE=0 turns it off.
    """
    c10d = sys.modules.get("torch._C._distributed_c10d")
    found: dict[str, Any] = {}
    for backend, name, options in _RECORDERS:
        dump = getattr(c10d, name, None)
        if dump is None:
            continue
        try:
            record = json.loads(dump(**options))
        except TypeError:  # a torch whose recorders are not kept by backend
            continue
        if record.get("entries"):
            found[backend] = record
    return found


_RECORDERS: Sequence[tuple[str, str, dict[str, Any]]] = (
    ("gloo", "_dump_fr_trace_json", {}),
    ("nccl", "_dump_nccl_trace_json", {}),
    ("nccl", "_dump_fr_trace_json", {"backend": "nccl"}),
    ("nccl2", "_dump_fr_trace_json", {"backend": "nccl2"}),
)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))
