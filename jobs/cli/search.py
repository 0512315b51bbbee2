"""The verb search: images by text or by image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipcluster.runs.files import require_writable, write_bytes
from clipcluster.runs.names import runs_folder
from clipcluster.text import counted
from jobs.cli.options import AnyModel, AsJson, Runs, Weights, print_document, say
from jobs.cli.progress import progress_bar

if TYPE_CHECKING:
    from tools.search.search import Answers

_SHOWN = 20  # bad images that are printed one by one


def search(
    what: AnyModel,
    images: Annotated[
        Path, typer.Option("--images", metavar="DIR", help="Folder with image files or shards, at any depth.")
    ],
    text: Annotated[
        list[str] | None, typer.Option("--text", metavar="TEXT", help="Look for this; may be repeated.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="FILE", help="Look for images like this one; may be repeated."),
    ] = None,
    count: Annotated[
        int, typer.Option("-k", "--count", metavar="N", min=1, help="Images listed for each query.")
    ] = 10,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PAGE.html", help="Also write a page with thumbnails.")
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            "--index", metavar="FOLDER", help="Where features are kept. Default: beside the images."
        ),
    ] = None,
    weights: Weights = None,
    as_json: AsJson = False,
    runs: Runs = None,
) -> None:
    """Find the images of a folder by text or by image; their features are kept for the next search."""
    from clipcluster.runtime.environment import share_cores
    from tools.search.search import search as find

    if out is not None:
        require_writable("--out", out, (".html", ".htm"))
    share_cores()
    with progress_bar("files", quiet=as_json) as progress:
        answers = find(
            what,
            images,
            text or [],
            image or [],
            count=count,
            runs=runs_folder(runs),
            weights=weights,
            index=index,
            say=lambda line: typer.echo(line, err=True),
            progress=progress,
        )
    if out is not None:
        from tools.search.page import page

        write_bytes(out, page(answers))
    if as_json:
        print_document(answers.document())
        return
    _tell(answers)
    if out is not None:
        say(f"wrote {out}")


def _tell(answers: Answers) -> None:
    """What was found, and what could not be used."""
    for query in answers.queries:
        say(f"{query.kind}: {query.value}")
        for hit in query.hits:
            say(f"  {hit.score:7.4f}  {hit.place.shown}")
    for bad in answers.bad[:_SHOWN]:
        say(f"not used: {bad.shown}: {bad.reason}")
    if len(answers.bad) > _SHOWN:
        say(f"not used: {len(answers.bad) - _SHOWN:,} more (all: --json)")
    say(f"searched {counted(answers.searched, 'image')}, {answers.encoded:,} of them new")
