"""Kinds of options that several verbs take, and how an answer is printed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from clipcluster.runs.files import finite

say = typer.echo  # an answer on stdout
SETTINGS = {"help_option_names": ["-h", "--help"]}

Runs = Annotated[
    Path | None,
    typer.Option(
        "--runs", metavar="DIR", help="The folder of runs. Default: $CLIPCLUSTER_RUNS, else ./runs."
    ),
]
AnyModel = Annotated[
    str,
    typer.Argument(
        metavar="RUN|CHECKPOINT|FOLDER",
        help="A run, or the folder of a checkpoint or of an OpenCLIP or Hugging Face model.",
    ),
]
Weights = Annotated[
    Literal["ema", "raw"] | None,
    typer.Option(
        "--weights",
        help="ema: the moving average; raw: the weights themselves. Default: ema if there is one.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def group(text: str, **more: Any) -> typer.Typer:
    """A group of verbs with this help; `more` as typer takes it."""
    return typer.Typer(
        **more,
        help=text,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings=SETTINGS,
    )


def console() -> Any:
    """rich's Console on stdout, as wide as the terminal; elsewhere as COLUMNS says."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit() else 200)


def show(table: Any) -> None:
    """Print what rich lays out; into a file or a pipe without the spaces that pad its lines."""
    where = console()
    if where.is_terminal:
        where.print(table)
        return
    with where.capture() as captured:
        where.print(table)
    say("\n".join(line.rstrip() for line in captured.get().split("\n")), nl=False)


def print_document(value: Any) -> None:
    """One JSON document on stdout; for NaN and infinities see `finite`."""
    value = [finite(one) for one in value] if isinstance(value, list) else finite(value)
    say(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str))  # str: paths, times
