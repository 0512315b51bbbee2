"""The verb `status`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipcluster.runs.names import all_runs, find_run, runs_folder
from jobs.cli.options import AsJson, Runs, console, print_document, say, show

if TYPE_CHECKING:
    from jobs.state import Queue

LOOK_SECONDS = 5.0
Names = Annotated[list[str] | None, typer.Argument(metavar="RUN", help="Runs. Default: all.")]


def status(
    names: Names = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every few seconds.")] = False,
    as_json: AsJson = False,
    runs: Runs = None,
) -> None:
    """Show what runs do, how far they are, and where their time went (in detail for runs that are named)."""
    from jobs.state import Queue
    from jobs.status import report

    folder = runs_folder(runs)

    def look(queue: Queue) -> list[dict[str, Any]]:
        chosen = [find_run(name, folder) for name in names] if names else all_runs(folder)
        return [report(run, queue) for run in chosen]

    if as_json:
        print_document(look(Queue()))
        return
    from jobs.cli.status_table import breakdown, status_table

    if watch:
        with suppress(KeyboardInterrupt):
            _watch(look)
        return
    found = look(Queue())
    if not found:
        say(f"no runs in {folder}; make one with: clipcluster submit RECIPE")
        return
    show(status_table(found, console().width))
    for one in found:
        for line in [*(breakdown(one) if names else []), *filter(None, [one["advice"]])]:
            say(f"{one['name']}: {line}")


def _watch(look: Callable[[Queue], list[dict[str, Any]]]) -> None:
    """The table again and again, runs at work first; SLURM is asked every ASK_SECONDS."""
    from rich.live import Live

    from jobs.cli.status_table import status_table
    from jobs.state import ASK_SECONDS, ENDED, Queue

    queue, asked, where = Queue(), time.monotonic(), console()
    with Live(console=where, auto_refresh=False) as live:
        while True:
            found = sorted(look(queue), key=lambda one: one["state"] in ENDED)
            table = status_table(found, where.width)
            table.title = time.strftime("%H:%M:%S")
            live.update(table, refresh=True)
            time.sleep(LOOK_SECONDS)
            if time.monotonic() - asked > ASK_SECONDS:
                queue, asked = Queue(), time.monotonic()
