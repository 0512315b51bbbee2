"""The loader's worker processes: they ignore the signals of their rank, and end when it ends.

They come from a fork server, never from a fork of the rank: the rank has threads (collectives, saving), and
a fork copies their locks. The server imports torch once, so that a worker starts in milliseconds.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader

from clipcluster.data.loading.worker import PartialBatch, Reader, WorkItem, reduced
from clipcluster.runtime.stacks import dump_on_request
from clipcluster.runtime.stop import ignore_signals

PREFETCH = 2  # batches a worker prepares ahead of the one in use
_SINGLE_THREAD = "clipcluster.data.loading.single_thread"
_PRELOAD = [
    _SINGLE_THREAD,  # first: what is loaded after it reads what it sets
    "torch",
    "torch.utils.data",
    "torchvision.io",
    "torchvision.transforms.v2",
    "PIL.Image",
    "numpy",
]
_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT}


class WorkerDied(Exception):
    """A loader worker was killed or crashed; a new attempt may succeed.

    It is no RuntimeError, since its reason ("Connection reset by peer") would be taken for a lost rank.
    """


class WorkerPool:
    """Gives work items to the workers in turn, and returns their partial batches in the same order.

    Without workers the work is done in the calling process.
    """

    def __init__(
        self, reader: Reader, items: Iterator[WorkItem], workers: int, prefetch: int = PREFETCH
    ) -> None:
        context = multiprocessing.get_context("forkserver") if workers else None
        if context is not None:
            context.set_forkserver_preload([*_PRELOAD, *reader.modules])
        # the recipe decides their number
        warnings.filterwarnings("ignore", r".*worker processes in total", UserWarning)
        self._loader: DataLoader[Any] = DataLoader(
            reader,  # type: ignore[arg-type]
            batch_sampler=items,  # type: ignore[arg-type]
            collate_fn=_unchanged,
            num_workers=workers,
            multiprocessing_context=context,
            worker_init_fn=_initialize if workers else None,
            prefetch_factor=prefetch if workers else None,
            generator=torch.Generator(),  # its seeds must not come from the process-wide generator
        )
        self._results: Any = None
        self._closed = False

    def take(self, count: int) -> list[PartialBatch]:
        """The next `count` partial batches; StopIteration when the work items are used up.

        Raises what a worker raised (DataError, OSError, OutOfMemory), or WorkerDied; the pool is closed then.
        """
        if self._closed:
            raise ValueError("this loader is closed")
        try:
            if self._results is None:
                if self._loader.num_workers:
                    _start_servers()
                with _signals_blocked():
                    self._results = iter(self._loader)
            results = [next(self._results) for _ in range(count)]
        except StopIteration:
            raise
        except Exception as error:
            dead = self._dead(wait=isinstance(error, OSError | EOFError | RuntimeError))
            self.close()
            if dead:
                raise WorkerDied(
                    f"loader worker {', '.join(map(str, dead))} was killed or crashed: {error}"
                ) from error
            raise
        for result in results:
            if isinstance(result, Exception):
                self.close()
                raise result
        return results

    def _dead(self, *, wait: bool) -> list[int]:
        """Process ids of dead workers; a connection may break shortly before its worker counts as dead."""
        workers = getattr(self._results, "_workers", [])
        if wait and workers:
            connection.wait([worker.sentinel for worker in workers], timeout=2)
        return [worker.pid for worker in workers if not worker.is_alive()]

    def close(self) -> None:
        """Kill the workers, which hold nothing that has to be saved."""
        self._closed = True
        results, self._results = self._results, None
        for worker in getattr(results, "_workers", []):
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(worker.pid, signal.SIGKILL)
        del results


def _unchanged(result: Any) -> Any:
    return result


def _initialize(worker: int) -> None:
    """Run in each worker before its first work item."""
    ignore_signals()
    dump_on_request()
    importlib.import_module(_SINGLE_THREAD)  # again: others may have started the fork server
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    ForkingPickler.register(torch.Tensor, reduced)
    threading.Thread(target=_exit_with_rank, daemon=True).start()


def _exit_with_rank() -> None:
    """Wait for the rank's end, however it came, and leave: the fork server between the two does not tell."""
    rank = multiprocessing.parent_process()
    if rank is not None:
        rank.join()
        os._exit(1)


def _start_servers() -> None:
    """Start the fork server and the resource tracker, if they do not run yet."""
    with _signals_blocked():
        resource_tracker.ensure_running()  # unblocks INT and TERM when it starts: hence a block of its own
    with _signals_blocked():
        forkserver.ensure_running()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Inside, signals are blocked: processes that are started here, as the fork server, inherit that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
