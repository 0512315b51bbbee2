"""The verbs `clipcluster site …`."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from typing import Annotated, Any

import typer

from clipcluster.errors import UserError
from clipcluster.runs.names import runs_folder
from jobs.cli.options import AsJson, Runs, group, print_document, say, show

site = group("Site profiles: what a cluster needs in every recipe.")
SiteName = Annotated[str, typer.Argument(metavar="NAME", help="The profile, as --site takes it.")]
_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


@site.command("new")
def site_new(
    name: SiteName,
    partition: Annotated[
        str | None, typer.Option("--partition", metavar="NAME", help="Default: the cluster's default one.")
    ] = None,
) -> None:
    """Write a profile from what SLURM says of this cluster."""
    from clipcluster.recipe.files import user_folder
    from jobs.sites import cluster, profile
    from jobs.submit.executor import require_slurm
    from tools.slurm import Slurm

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name == "example":
        raise UserError(
            f"{name!r} cannot name a profile: allowed are letters, digits and _ . -, but not example"
        )
    file = user_folder(os.environ) / f"{name}.yaml"
    if os.path.lexists(file):
        raise UserError(f"{file} exists; remove it first, or give another name")
    require_slurm()
    text = profile.text(name, cluster.ask(Slurm()), partition)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UserError(f"{file} exists; it was written meanwhile") from None
    say(text, nl=False)
    say(f"\nwrote {file}; edit it, then: clipcluster site check {name}")


@site.command("check")
def site_check(
    name: SiteName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the profile that differ, such as nodes=1."),
    ] = None,
    as_json: AsJson = False,
    runs: Runs = None,
) -> None:
    """Submit a job of two nodes that tries what runs need, and print what is wrong.

    The exit code is 1 if anything is. The job takes about a minute once it runs (its limit is 5), and is then
    cancelled.
    """
    from clipcluster.recipe.load import load_cluster
    from jobs.sites import check
    from jobs.sites.findings import findings
    from jobs.submit.executor import require_slurm
    from tools.slurm import Slurm

    wanted = load_cluster([*check.OVERRIDES, *(overrides or ())], site=name)
    require_slurm()

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    check.refuse(wanted, Slurm(), tell)
    found = check.run(wanted, name, runs_folder(runs), Slurm(), tell)
    lines = findings(found)
    if as_json:
        print_document({"site": name, "job": found.job, "findings": [asdict(line) for line in lines]})
    else:
        show(_table(lines))
    if any(line.kind == "error" for line in lines):
        raise typer.Exit(1)


def _table(lines: list[Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("what", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold", ratio=3)
    table.add_column("what to do", overflow="fold", ratio=2)
    for line in lines:
        mark = f"[{_STYLES[line.kind]}]{line.kind}[/]"
        table.add_row(escape(line.what), mark, escape(line.found), escape(line.advice))
    return table
