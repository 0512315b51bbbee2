"""What the verbs of the command share: kinds of options, and how an answer is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

SETTINGS = {"help_option_names": ["-h", "--help"]}

Runs = Annotated[
    Path | None,
    typer.Option("--runs", metavar="DIR", help="Where runs live. Default: $CLIPCLUSTER_RUNS, else ./runs"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def group(text: str) -> typer.Typer:
    """A group of verbs with this help."""
    return typer.Typer(
        help=text,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings=SETTINGS,
    )


def say(text: str) -> None:
    """One answer on stdout."""
    typer.echo(text)


def print_document(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))  # paths, times
