"""The ranks of a test as forked processes: torch and the models are imported once for all of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from typing import Any


def exit_codes(rank: Callable[..., None], arguments: Iterable[tuple[Any, ...]]) -> list[int | None]:
    """Run `rank` in a process for each tuple of arguments, all at once; how each ended."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=rank, args=own) for own in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
