"""The processes of a conversion on one machine.

Workers are forked from the command before it writes anything itself, so that they start at once and share
what was listed. They draw shards from a counter in a file, and report over a pipe.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from clipcluster.errors import UserError
from tools.convert import work as making
from tools.convert.plan import Plan, Shard

Progress = Callable[[int, int], None]
_NUMBER = struct.Struct("q")


def run(plan: Plan, workers: int, progress: Progress | None = None) -> None:
    """Writes the unfinished shards with up to `workers` processes, in this one if there is one shard left.

    UserError and OSError as `work` raises them; the first worker that fails ends the others.
    """
    left_out = making.read_left_out(plan)
    shards = [shard for shard in plan.shards() if making.finished(plan, shard, left_out) is None]
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
        _Crew(plan, shards, min(workers, len(shards))).run(report)


class _Counter:
    """Deals the shards to processes: a file holds the next number, locked by whoever draws it.

    Such a lock ends with the process that holds it, so one that is killed keeps nobody waiting.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._places = {shard: place for place, shard in enumerate(shards)}
        self._fd = os.memfd_create("next-shard")
        os.truncate(self._fd, _NUMBER.size)
        self._mine = -1

    def close(self) -> None:
        """Nobody draws any more."""
        os.close(self._fd)

    def claim(self, shard: Shard) -> bool:
        """Whether the shard is this process's; asked in the order of the shards."""
        place = self._places.get(shard)
        if place is None:
            return False
        if self._mine < 0:
            self._mine = self._draw()
        if place != self._mine:
            return False
        self._mine = -1
        return True

    def _draw(self) -> int:
        fd = self._fd
        fcntl.lockf(fd, fcntl.LOCK_EX)
        try:
            (number,) = _NUMBER.unpack(os.pread(fd, _NUMBER.size, 0))
            os.pwrite(fd, _NUMBER.pack(number + 1), 0)
        finally:
            fcntl.lockf(fd, fcntl.LOCK_UN)
        return int(number)


class _Crew:
    """The forked workers, and the pipe they report over: a line is a number of samples, or an error."""

    def __init__(self, plan: Plan, shards: Sequence[Shard], size: int) -> None:
        self._plan = plan
        self._counter = _Counter(shards)
        self._size = size
        self._pids: set[int] = set()

    def run(self, report: Callable[[int], None]) -> None:
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            for _ in range(self._size):
                pid = os.fork()
                if pid == 0:
                    os.close(reading)
                    _work(self._plan, self._counter, writing)
                self._pids.add(pid)
            os.close(writing)
            with open(reading, encoding="utf-8") as lines:
                for line in lines:
                    message = json.loads(line)
                    if isinstance(message, int):
                        report(message)
                    else:
                        _raise(message)
            self._wait()
        finally:
            for pid in self._pids:
                os.kill(pid, signal.SIGTERM)
            for pid in self._pids:
                os.waitpid(pid, 0)
            self._counter.close()

    def _wait(self) -> None:
        while self._pids:
            pid, status = os.wait()
            self._pids.discard(pid)
            if status:
                code = os.waitstatus_to_exitcode(status)
                how = signal.Signals(-code).name if code < 0 else f"code {code}"
                raise UserError(
                    f"convert: a worker was ended by {how} (out of memory?); the same command goes on where "
                    "it stopped, --workers 1 needs less"
                )


def _work(plan: Plan, counter: _Counter, writing: int) -> NoReturn:
    """The life of a worker."""
    parent = os.getppid()
    code = 1
    gc.freeze()  # what was listed is looked at no more
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the command ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def report(samples: int) -> None:
        if os.getppid() != parent:
            os._exit(1)  # the command was killed: nobody would collect the rest
        os.write(writing, b"%d\n" % samples)

    try:
        making.work(plan, counter.claim, report)
        code = 0
    except UserError as error:
        _tell(writing, {"user": str(error)})
    except OSError as error:
        _tell(writing, {"os": [error.errno, error.strerror, error.filename and str(error.filename)]})
    except BaseException:
        _tell(writing, {"crash": traceback.format_exc()})
    finally:
        os._exit(code)


def _tell(writing: int, message: dict[str, Any]) -> None:
    os.write(writing, json.dumps(message).encode() + b"\n")


def _raise(message: dict[str, Any]) -> NoReturn:
    if "user" in message:
        raise UserError(str(message["user"]))
    if "os" in message:
        raise OSError(*message["os"])
    raise RuntimeError(f"a worker failed:\n{message['crash']}")
