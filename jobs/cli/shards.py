"""The verbs `clipcluster shards …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.convert import convert, progress_bar, summary_line
from jobs.cli.options import AsJson, group, print_document, say

shards = group("Shards of samples, and their indexes.")
shards.add_typer(convert, name="convert")


@shards.command()
def index(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="DIR...", help="Folders of shards; or one address, or pipe:COMMAND."),
    ],
    elsewhere: Annotated[
        Path | None, typer.Option("--index", metavar="FOLDER", help="Put the index elsewhere.")
    ] = None,
    captions: Annotated[
        list[str] | None,
        typer.Option(
            "--captions",
            metavar="CHOICE",
            help="Count these too: default, lines, txt, json:FIELD, MEMBER.json:FIELD; repeatable.",
        ),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Scan what looks unchanged too.")] = False,
    workers: Annotated[int, typer.Option("--workers", metavar="N", help="Processes.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Make the index that training reads samples by."""
    from tools.shards.index import index_folders

    with progress_bar(quiet=as_json) as progress:
        summaries = index_folders(
            folders, index=elsewhere, captions=captions, again=again, workers=workers, progress=progress
        )
    if as_json:
        from dataclasses import asdict

        print_document([asdict(summary) for summary in summaries])
        return
    for summary in summaries:
        say(summary_line(summary))
