"""The verbs of `clipcluster runs`: what takes space in run folders, and what may go."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from clipcluster.errors import UserError
from clipcluster.runs.folder import Run
from clipcluster.runs.names import all_runs, runs_folder
from jobs.cli.options import AsJson, Runs, group, print_document, say, show
from jobs.cli.sweeps import all_of

runs = group("Run folders: what takes space, and what may go.")
Names = Annotated[list[str] | None, typer.Argument(metavar="RUN", help="Runs. Default: all.")]


@runs.command()
def du(names: Names = None, as_json: AsJson = False, runs: Runs = None) -> None:
    """Show what runs take, the largest first, and how much of it `prune` would remove."""
    from jobs.space import PARTS, named_by_others, used
    from jobs.state import Queue

    queue, named, found = Queue(), cache(named_by_others), list[dict[str, Any]]()
    for run in _chosen(names, runs):
        try:
            found.append(used(run, queue, named(run.path.parent)))
        except UserError as refusal:
            typer.echo(f"{run.name}: {refusal}", err=True)
    found.sort(key=lambda one: one["bytes"], reverse=True)
    if as_json:
        print_document(found)
        return
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", no_wrap=True)
    table.add_column("state")
    for name in ("all", *PARTS, "may go"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        parts = (decimal(one["parts"][name]) if one["parts"][name] else "" for name in PARTS)
        free = decimal(one["removable"]) if one["removable"] else ""
        table.add_row(one["name"], one["state"], decimal(one["bytes"]), *parts, free)
    show(table)
    whole, free = (sum(one[name] for one in found) for name in ("bytes", "removable"))
    say(f"{decimal(whole)} in all; {decimal(free)} may go: clipcluster runs prune")


@runs.command()
def prune(
    names: Names = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it. Default: say what would go.")] = False,
    runs: Runs = None,
) -> None:
    """Remove what nothing needs any more of runs without a job: old checkpoints, broken ones, leftovers.

    The newest checkpoint that verifies stays, those that checkpoint.keep keeps by `every` and `best`, those
    that are still to be evaluated, and those that another run of the folder starts from.
    """
    from rich.filesize import decimal

    from clipcluster.runs.checkpoints import is_complete
    from jobs.space import named_by_others, removable
    from jobs.space import prune as remove
    from jobs.state import Queue, state_of
    from jobs.submit.submit import only_submission

    queue, named, freed = Queue(), cache(named_by_others), 0
    for run in _chosen(names, runs):
        try:
            state = state_of(run, queue)
            if state.queued or not state.ended:
                say(f"{run.name} is {state}: nothing of it is removed")
                continue
            if yes:
                with only_submission(run.path.parent, say):
                    for one in remove(run, Queue()):
                        say(f"removed {one.path} ({decimal(one.bytes)}): {one.why}")
                        freed += one.bytes
                continue
            for one in removable(run, is_complete, named(run.path.parent)):
                say(f"would remove {one.path} ({decimal(one.bytes)}): {one.why}")
                freed += one.bytes
        except UserError as refusal:
            say(f"{run.name}: {refusal}")
    say(f"{decimal(freed)} {'freed' if yes else 'would be freed; to remove it: --yes'}")


def _chosen(names: list[str] | None, folder: Path | None) -> list[Run]:
    where = runs_folder(folder)
    return all_of(names, where) if names else all_runs(where)
