"""The verbs `clipcluster shards …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.cli_words import AsJson, group, print_document, say

shards = group("Shards of samples, and their indexes.")


def _summary(made: Any) -> str:
    """One line for the index of one folder."""
    text = f"{made.folder}: {made.samples:,} samples with {made.captions:,} captions in {made.shards} shards"
    for count, what in (
        (made.without_caption, "without a caption"),
        (made.without_image, "without an image"),
    ):
        text += f", {count:,} {what}" if count else ""
    return text + (f", broken: {', '.join(map(str, made.broken))}" if made.broken else "")


@shards.command()
def convert(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="What is converted: digits.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to make.")],
    as_json: AsJson = False,
) -> None:
    """Convert data into indexed shards; a finished folder is left as it is."""
    from dataclasses import asdict

    from tools.convert import convert as make

    done = make(kind, out)
    if as_json:
        print_document(
            {"out": str(out), "made": done.made, "splits": {n: asdict(s) for n, s in done.splits.items()}}
        )
        return
    for summary in done.splits.values():
        say(_summary(summary))
    say(f"{out}: " + ("made" if done.made else "was there already, whole"))


@shards.command()
def index(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of shards.")],
    elsewhere: Annotated[
        Path | None, typer.Option("--index", metavar="FOLDER", help="Put the index elsewhere.")
    ] = None,
    captions: Annotated[
        str | None, typer.Option("--captions", metavar="CHOICE", help="default, lines or json:FIELD.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Scan what looks unchanged too.")] = False,
    workers: Annotated[int, typer.Option("--workers", metavar="N", help="Processes.")] = 1,
) -> None:
    """Make the index that training reads samples by."""
    from tools.index import index_folders

    summaries = index_folders(folders, index=elsewhere, captions=captions, again=again, workers=workers)
    for summary in summaries:
        say(_summary(summary))


@shards.command()
def verify(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of shards.")],
    elsewhere: Annotated[
        Path | None, typer.Option("--index", metavar="FOLDER", help="Where the index is.")
    ] = None,
    images: Annotated[bool, typer.Option("--images/--no-images", help="Decode every image.")] = True,
    as_json: AsJson = False,
) -> None:
    """Read every byte again and compare with the index; exit 1 where something is broken."""
    from tools.verify import verify as read

    reports = [read(folder, elsewhere, images=images) for folder in folders]
    if as_json:
        print_document([report.as_dict() for report in reports])
    else:
        for report in reports:
            say(
                f"{report.folder}: {report.samples:,} samples in {report.shards} shards, "
                + ("whole" if report.whole else f"{len(report.broken)} broken, {len(report.bad)} bad")
            )
            for fault in [*report.broken, *report.bad][:20]:
                say(f"  {fault['shard']} {fault['key'] or ''}: {fault['reason']}")
    if not all(report.whole for report in reports):
        raise typer.Exit(1)
