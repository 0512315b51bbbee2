"""Trainees for the tests of a rank: each ends in its own way, none needs torch unless it says so."""

import builtins
import json
import os
import resource
import signal
import subprocess
import sys
import time

from clipcluster.errors import StaleAttempt, UserError
from clipcluster.runtime import outcome as endings
from clipcluster.runtime.outcome import Outcome

OTHERS = {"UserError": UserError, "StaleAttempt": StaleAttempt}


def finish(run, attempt, launch, stop):
    attempt.step = 7
    print("from Python")
    print("to stderr", file=sys.stderr)
    os.write(1, b"from the descriptor\n")
    subprocess.run(["sh", "-c", "echo from a child; echo to its stderr >&2"], check=True)
    print("torch loaded:", "torch" in sys.modules)
    return Outcome.FINISHED


def until_stopped(run, attempt, launch, stop):
    attempt.event("ready", writer=f"rank-{launch.rank}")
    deadline = time.monotonic() + 30
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    attempt.step = 3
    return Outcome.STOPPED


def rank_0_is_slow(run, attempt, launch, stop):
    time.sleep(1 if launch.rank == 0 else 0)
    return Outcome.STOPPED


def fail(run, attempt, launch, stop):
    """Raise $RAISE."""
    name = os.environ["RAISE"]
    kind = getattr(endings, name, None) or OTHERS.get(name) or getattr(builtins, name)
    raise kind("on purpose")


def fail_at_a_step(run, attempt, launch, stop):
    attempt.step = 5
    pid, address = os.getpid(), id(run)
    raise RuntimeError(
        f"shape of <Tensor at 0x{address:x}> does not fit (peer [127.0.0.1]:{pid}, pid {pid})\nframes"
    )


def fail_together(run, attempt, launch, stop):
    time.sleep(0.5 if launch.rank == 0 else 0)
    raise endings.NonFiniteError("not finite", "lower optim.lr", agreed=True)


def fail_on_rank_1(run, attempt, launch, stop):
    if launch.rank == 1:
        raise endings.DataError("0.tar changed", "index it again")
    attempt.wait_for_outcome(20)
    raise endings.LostPeers("rank 1 is gone")


def leave_with_a_code(run, attempt, launch, stop):
    sys.exit(1)


def interrupt(run, attempt, launch, stop):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)


def overtaken(run, attempt, launch, stop):
    """The node was called dead: the job claims elsewhere while this rank goes on."""
    run.claim(attempt.job, host="n2", still_running=lambda job: False)
    if os.environ.get("RAISE"):
        fail(run, attempt, launch, stop)
    return Outcome.FINISHED


def full_disk(run, attempt, launch, stop):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    raise endings.DataError("0.tar changed")


def with_torch(run, attempt, launch, stop):
    import torch
    import torch.distributed

    what = os.environ["RAISE"]
    if what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    if what == "host memory":
        torch.empty(1 << 60, dtype=torch.uint8)
    raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1")


def launches(run, attempt, launch, stop):
    line = {"rank": launch.rank, "attempt": attempt.number, "job": attempt.job}
    print(json.dumps(line), file=sys.__stdout__, flush=True)
    (run.path / f"rank-{launch.rank}.json").write_text(json.dumps(line))
    return Outcome.FINISHED
