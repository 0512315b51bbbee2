"""What the verbs of the command share: kinds of options, and how an answer is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from clipcluster.runs.files import finite

SETTINGS = {"help_option_names": ["-h", "--help"]}

Runs = Annotated[
    Path | None,
    typer.Option("--runs", metavar="DIR", help="Where runs are. Default: $CLIPCLUSTER_RUNS, else ./runs"),
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


def say(text: str) -> None:
    """One answer on stdout."""
    typer.echo(text)


def print_document(value: Any) -> None:
    """One JSON document on stdout; for NaN and infinities see `finite`."""
    value = [finite(one) for one in value] if isinstance(value, list) else finite(value)
    plain = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    typer.echo(plain)  # default=str: paths, times
