"""The verb `status`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipcluster.errors import UserError
from clipcluster.runs.names import all_runs, runs_folder
from jobs.cli.options import AsJson, Runs, console, print_document, say, show
from jobs.cli.sweeps import all_of

if TYPE_CHECKING:
    from jobs.state import Queue

LOOK_SECONDS = 5.0
Names = Annotated[
    list[str] | None, typer.Argument(metavar="RUN", help="Runs, sweeps or chains. Default: all runs.")
]


def status(
    names: Names = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every few seconds.")] = False,
    as_json: AsJson = False,
    runs: Runs = None,
) -> None:
    """Show what runs do, how far they are, and where their time went (in detail for runs that are named)."""
    from jobs.state import Queue
    from jobs.status import reports

    folder = runs_folder(runs)

    def look(queue: Queue) -> list[dict[str, Any]]:
        return reports(all_of(names, folder, chains=True) if names else all_runs(folder), queue)

    if watch and as_json:
        raise UserError("status: --watch and --json were given; give one of them")
    if as_json:
        print_document(look(Queue()))
        return
    if watch:
        with suppress(KeyboardInterrupt):
            _watch(look)
        return
    from jobs.cli.status_table import breakdown, status_table

    found = look(Queue())
    if not found:
        say(f"no runs in {folder}; make one with: clipcluster submit RECIPE")
        return
    show(status_table(found, console().width))
    for one in found:
        for line in [*(breakdown(one) if names else []), *one["notes"], *filter(None, [one["advice"]])]:
            say(f"{one['name']}: {line}")


def _watch(look: Callable[[Queue], list[dict[str, Any]]]) -> None:
    """The table again and again, runs at work first; SLURM is asked every ASK_SECONDS."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from jobs.cli.status_table import status_table
    from jobs.state import ASK_SECONDS, ENDED, Queue
    from jobs.status import UNREADABLE

    queue, asked, where = Queue(), time.monotonic(), console()
    live = Live(console=where, auto_refresh=False) if where.is_terminal else None
    with live or nullcontext():
        while True:
            began = time.monotonic()
            found = sorted(look(queue), key=lambda one: one["state"] in {*ENDED, UNREADABLE})
            notes = [Text(f"{one['name']}: {note}") for one in found for note in one["notes"]]
            shown = Group(Text(time.strftime("%H:%M:%S")), status_table(found, where.width), *notes)
            if live:
                live.update(shown, refresh=True)
            else:
                show(shown)
            time.sleep(max(LOOK_SECONDS, 4 * (time.monotonic() - began)))  # a login node has other users
            if time.monotonic() - asked > ASK_SECONDS:
                queue, asked = Queue(), time.monotonic()
