"""The worker processes of a conversion on one machine.

Workers are forked from the command before it writes anything itself, so that they start at once and share
what was listed. Each takes the next shard that none has taken until none is left.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any

from clipcluster.errors import UserError
from clipcluster.runtime.outcome import described, restored
from tools.convert import work as making
from tools.convert.plan import Plan, Shard

Progress = Callable[[int, int], None]
_FORK = multiprocessing.get_context("fork")
_POLL_SECONDS = 0.2


def run(plan: Plan, workers: int, progress: Progress | None = None) -> None:
    """Write the unfinished shards with up to `workers` processes, in this one if there is one shard left.

    Raises what `work` raises (UserError, OSError); the first worker that fails ends the others. Raises
    UserError, naming the signal, if a worker is killed.
    """
    left_out = making.read_left_out(plan)
    shards = [shard for shard in plan.shards if making.finished(plan, shard, left_out) is None]
    total = sum(len(split) for split in plan.splits)
    done = total - sum(shard.stop - shard.start for shard in shards)

    def report(samples: int) -> None:
        nonlocal done
        done += samples
        if progress is not None:
            progress(done, total)

    report(0)
    if min(workers, len(shards)) < 2:
        making.work(plan, lambda shard: True, report)
    else:
        _run_pool(_Job(plan), min(workers, len(shards)), report)


class _Stopped(Exception):
    """The command wants no more shards: another worker failed, or Ctrl-C was pressed."""


class _Job:
    """What the workers inherit: the plan, which shards are taken, and a count of samples done."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.samples = _FORK.Value("q", 0)
        self.stopped = _FORK.Value("b", 0, lock=False)  # a killed worker may hold a lock for ever
        self._numbers = {shard: number for number, shard in enumerate(plan.shards)}
        self._taken = _FORK.Array("b", len(plan.shards))

    def claim(self, shard: Shard) -> bool:
        """Whether the shard is this worker's."""
        number = self._numbers[shard]
        with self._taken.get_lock():
            taken = self._taken[number]
            self._taken[number] = 1
        return not taken

    def report(self, samples: int) -> None:
        """Count samples. Raises _Stopped."""
        if self.stopped.value:
            raise _Stopped
        with self.samples.get_lock():
            self.samples.value += samples


def _run_pool(job: _Job, size: int, report: Callable[[int], None]) -> None:
    pool = ProcessPoolExecutor(size, mp_context=_FORK, initializer=_start, initargs=(job,))
    workers: list[BaseProcess] = []
    reported = 0
    try:
        pending: set[Any] = {pool.submit(_work) for _ in range(size)}
        workers = multiprocessing.active_children()
        while pending:
            finished, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
            samples = job.samples.get_obj().value  # without the lock, which a killed worker may hold
            report(samples - reported)
            reported = samples
            for future in finished:
                future.result()
    except BrokenProcessPool:
        pool.shutdown()
        # the pool ends the others by SIGTERM
        codes = {worker.exitcode or 0 for worker in workers} - {0, -signal.SIGTERM}
        code = min(codes, default=-signal.SIGTERM)
        raise UserError(
            f"convert: a worker was ended by {signal.Signals(-code).name if code < 0 else f'code {code}'} "
            "(out of memory?); the same command continues where it stopped, and --workers 1 needs less memory"
        ) from None
    finally:
        job.stopped.value = 1
        pool.shutdown()


_job: _Job | None = None


def _start(job: _Job) -> None:
    """Begin the life of a worker."""
    global _job
    _job = job
    gc.freeze()  # what was listed is not looked at again
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the command ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_command, daemon=True).start()


def _exit_with_command() -> None:
    """Wait for the command's end, however it came: a worker without a shard would wait for the next one."""
    command = multiprocessing.parent_process()
    if command is not None:
        command.join()
        os._exit(1)


def _work() -> None:
    assert _job is not None
    try:
        making.work(_job.plan, _job.claim, _job.report)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # the pool would take the worker for killed
            raise restored(described(error)) from error
        raise
