"""Run by test_watchdog: one of three ranks without torch, with a watchdog.

python watched.py RUN RANK [FIFO|interpreter|late]   from step 20 on rank 1 reads its batches from FIFO, or
keeps the interpreter for itself; or the native frames of rank 2 take a while
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from types import SimpleNamespace

from clipcluster.rank.output import log_to, redirect
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from clipcluster.runtime import stacks
from clipcluster.runtime.pulse import FEATURES, GRADIENTS, Pulse
from clipcluster.runtime.stop import Wish
from clipcluster.train import watchdog
from tests.jobs.trainee import Peers

SIZE, NODES = 3, ("n1", "n1", "n2")


def next_batch(how: str) -> None:
    if how == "interpreter":
        ctypes.PyDLL(None).sleep(60)  # unlike CDLL it gives no other thread a turn
    elif how not in ("", "late"):
        with open(how) as stream:
            stream.read()
    time.sleep(0.01)


def main() -> None:
    run, rank, how = Run(sys.argv[1]), int(sys.argv[2]), "".join(sys.argv[3:])
    attempt = run.newest()
    assert attempt
    redirect(attempt.path / f"rank-{rank}.out")
    log_to(sys.stdout, rank)
    attempt.event("start", writer=f"rank-{rank}", node=NODES[rank], pid=os.getpid())
    peers, pulse = Peers(SimpleNamespace(rank=rank, size=SIZE), attempt), Pulse()
    if how == "interpreter":
        watchdog.REPORT_SECONDS = 5.0
    if how == "late" and rank == 2:
        stacks.dump_native = lambda: (time.sleep(1.0), print("native frames", flush=True))
        stacks.flight_records = lambda: {"gloo": {"entries": [1]}}
    with watchdog.Watchdog(pulse, attempt, rank, SIZE, 1.0):
        train(attempt, rank, peers, pulse, how)


def train(attempt: Attempt, rank: int, peers: Peers, pulse: Pulse, how: str) -> None:
    for step in range(1, 10_000):
        pulse.fetch()
        next_batch(how if rank == 1 and step >= 20 else "")
        pulse.begin(FEATURES)
        pulse.begin(GRADIENTS)
        attempt.step = step
        pulse.stepped()
        with pulse.with_others():
            peers.agree(Wish.NONE)
        if rank == 0 and step == 15:
            attempt.metrics({"step": step})


if __name__ == "__main__":
    main()
