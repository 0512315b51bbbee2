"""A bar on a terminal while work is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    what: str = "samples", *, quiet: bool = False
) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal's stderr, gone at the end; None elsewhere, or if `quiet`."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show
