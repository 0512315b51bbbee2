"""Work on shards in processes of their own, so that a decoder that crashes or hangs costs one sample.

A worker says at which sample it is. If it dies there, or stays there longer than `patience`, the sample is
handed back with the reason, and another worker does the shard again without it.
"""

import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from typing import Any, Generic, TypeVar

from clipcluster.data.shards.dataset import Dataset
from clipcluster.errors import UserError

PATIENCE = 60.0  # seconds for one sample
_CONTEXT = get_context("spawn")

T = TypeVar("T")

# task(shards, shard, lost, at): `lost` are the positions not to touch, each with its reason; `at(position)`
# is called before a sample is touched, `at(-1)` after the last.
Task = Callable[[Dataset, int, Mapping[int, str], Callable[[int], None]], T]


class PoolError(UserError):
    """A worker died outside of a sample, for want of memory most likely; the message says how."""


@dataclass(eq=False)
class _Worker(Generic[T]):
    """One process, what it is doing, and since when it has been at the same sample."""

    task: Task[T]
    shards: Dataset
    shard: int = -1
    seen: int = -1
    since: float = 0.0
    pipe: Any = field(init=False)
    process: Any = field(init=False)
    position: Any = field(init=False)

    def __post_init__(self) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self.position = _CONTEXT.Value("q", -1, lock=False)
        self.process = _CONTEXT.Process(
            target=_serve, args=(theirs, self.position, self.task, self.shards), daemon=True
        )
        self.process.start()
        theirs.close()

    def give(self, shard: int, lost: Mapping[int, str]) -> None:
        self.shard, self.seen, self.since = shard, -1, time.monotonic()
        self.position.value = -1
        self.pipe.send((shard, dict(lost)))

    def late(self, patience: float) -> bool:
        """Whether it has been at one sample for too long."""
        at, now = self.position.value, time.monotonic()
        if at != self.seen or at < 0:
            self.seen, self.since = at, now
        return now - self.since > patience

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def over_shards(
    task: Task[T],
    shards: Dataset,
    *,
    workers: int = 1,
    patience: float = PATIENCE,
    progress: Callable[[int, int], None] | None = None,
) -> list[T]:
    """The task's results for all shards, in order; `task` is a function of a module or a partial of one.

    With `workers` 0 it works in this process, for tasks that decode nothing or nothing dangerous.

    `progress(done, total)` is called after every shard. Raises what the task raises (OSError and the like),
    and PoolError if a process dies outside of a sample.
    """
    if workers == 0:
        return _inline(task, shards, progress)
    todo, results = deque(range(len(shards))), dict[int, T]()
    lost: dict[int, dict[int, str]] = {}
    pool = [_Worker(task, shards) for _ in range(max(1, min(workers, len(shards))))]
    try:
        idle = list(pool)
        while len(results) < len(shards):
            while idle and todo:
                shard = todo.popleft()
                idle.pop().give(shard, lost.get(shard, {}))
            busy = [worker for worker in pool if worker not in idle]
            for worker, answer in _answers(busy, patience):
                if isinstance(answer, str):
                    if worker.seen < 0 or worker.seen in lost.get(worker.shard, ()):
                        raise PoolError(
                            f"the process that read {shards.shard_name(worker.shard)} {answer}; check "
                            "memory, and try fewer --workers"
                        )
                    lost.setdefault(worker.shard, {})[worker.seen] = f"the decoder {answer}"
                    todo.appendleft(worker.shard)
                    worker.end()
                    pool.remove(worker)
                    pool.append(_Worker(task, shards))
                    idle.append(pool[-1])
                    continue
                results[worker.shard] = answer[0]
                idle.append(worker)
                if progress is not None:
                    progress(len(results), len(shards))
    finally:
        for worker in pool:
            worker.end()
    return [results[shard] for shard in range(len(shards))]


def _inline(task: Task[T], shards: Dataset, progress: Callable[[int, int], None] | None) -> list[T]:
    results = []
    for shard in range(len(shards)):
        results.append(task(shards, shard, {}, lambda position: None))
        if progress is not None:
            progress(shard + 1, len(shards))
    return results


def _answers(busy: list[_Worker[T]], patience: float) -> Iterator[tuple[_Worker[T], tuple[T] | str]]:
    """What came within a moment: a result as a tuple of one, or what became of the worker."""
    ready = connection.wait([worker.pipe for worker in busy], timeout=min(1.0, patience / 4))
    for worker in busy:
        if worker.pipe in ready:
            try:
                kind, value = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                worker.process.join()
                worker.seen = worker.position.value
                yield worker, _death(worker.process.exitcode)
                continue
            if kind == "error":
                raise value
            yield worker, (value,)
        elif worker.late(patience):
            yield worker, f"took longer than {patience:.0f} s"


def _death(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    return f"crashed ({signal.Signals(-code).name})"


def _serve(pipe: Any, current: Any, task: Task[T], shards: Dataset) -> None:
    """A worker's life: one shard after the other, until the parent goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer

    def at(position: int) -> None:
        current.value = position

    while True:
        try:
            shard, lost = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[str, Any] = ("done", task(shards, shard, lost, at))
        except Exception as error:
            error.__notes__ = [*getattr(error, "__notes__", []), traceback.format_exc()]
            answer = ("error", error)
        at(-1)
        pipe.send(answer)
