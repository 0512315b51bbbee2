"""The ranks of a test as forked processes: torch and the models are imported once for all of them."""

from __future__ import annotations

import datetime
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clipcluster.runtime.world import World


def exit_codes(rank: Callable[..., None], arguments: Iterable[tuple[Any, ...]]) -> list[int | None]:
    """Run `rank` in a process for each tuple of arguments, all at once; how each ended."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=rank, args=own) for own in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@contextmanager
def world_over_gloo(out: Path, rank: int, size: int) -> Iterator[World]:
    """The world of one of `size` ranks on the CPU, each with one thread; they meet by a file in `out`."""
    torch.set_num_threads(1)
    if size > 1:
        store, wait = f"file://{out}/store-{size}", datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=wait)
    yield World(rank, size, rank, torch.device("cpu"))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def run_worlds(rank: Callable[..., None], out: Path, sizes: Iterable[int], *more: Any) -> int:
    """Run `rank(out, number, size, *more)` on all ranks of each size, one size after another; 0, or 1 once
    a rank failed.
    """
    for size in sizes:
        if any(exit_codes(rank, [(out, number, size, *more) for number in range(size)])):
            return 1
    return 0
