"""The command `clipcluster`: its groups of verbs, and what becomes of an error."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, NoReturn

import typer

from clipcluster.errors import UserError
from jobs.cli.options import group, say
from jobs.cli.runs import VERBS
from jobs.cli.words import pointer, verb_first

# Some versions of typer bring a click of their own, so the class is found, not imported.
UsageProblem: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        say(f"clipcluster {version('clipcluster')}")
    except PackageNotFoundError:
        say(f"clipcluster, not installed, in {Path(__file__).resolve().parents[2]}")
    raise typer.Exit


def _top(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Trains CLIP-style models on preemptible SLURM clusters from one YAML recipe."""


GROUPS = {
    "shards": "jobs.cli.shards:shards",
    "runs": "jobs.cli.space:runs",
    "site": "jobs.cli.site:site",
    "sandbox": "jobs.cli.sandbox:sandbox",
    "bench": "jobs.cli.bench:bench",
}


def command_for(words: Sequence[str]) -> Any:
    """The command, as click has it: with one verb or group of verbs where `words` begin so, else with all.

    Describing all their options takes as long as checking a recipe.
    """
    app = group("Trains CLIP-style models on preemptible SLURM clusters from one YAML recipe.")
    app.callback()(_top)
    known = {*GROUPS, *(verb.__name__ for verb in VERBS)}
    needed = words[:1] if words and words[0] in known else known
    for verb in VERBS:
        if verb.__name__ in needed:
            app.command()(verb)
    for name, target in GROUPS.items():
        if name in needed:
            app.add_typer(resolve_name(target), name=name)
    return typer.main.get_command(app)


# What the file system says to a path that somebody typed; all else is a fault of the program.
_REFUSALS = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions or choose another path"),
    **dict.fromkeys((errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST), "choose another path"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make space and run the same command again"),
    errno.ENAMETOOLONG: "give a shorter name",
}


def main() -> NoReturn:
    """Run the command; a user's error is one message on stderr and code 2."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "true")  # else every installed package is looked into
    command = command_for(sys.argv[1:])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    words = verb_first(sys.argv[1:], command)
    try:
        code = command.main(words, prog_name="clipcluster", standalone_mode=False)
    except UserError as error:
        from clipcluster.data.storage.urls import addresses_redacted

        typer.echo(f"error: {addresses_redacted(str(error))}", err=True)  # it may quote what was typed
        code = 2
    except UsageProblem as problem:
        code = _usage(problem, words, command)
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader (head, less) has gone: not an error
        code = 0
    except OSError as error:
        if error.errno not in _REFUSALS or error.filename is None:
            raise
        typer.echo(f"error: {error.filename}: {error.strerror}; {_REFUSALS[error.errno]}", err=True)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _usage(problem: Any, words: list[str], command: Any) -> int:
    """One message for a command line that cannot be understood."""
    context = getattr(problem, "ctx", None)
    if type(problem).__name__ == "NoArgsIsHelpError":
        if message := problem.format_message():  # empty where rich has printed the help already
            typer.echo(message)
        return 2
    message = problem.format_message().replace(": Value error, ", ": ")
    message = message.replace(": Input should be ", ": should be ")
    if hasattr(problem.__cause__, "errors"):  # pydantic's
        message, error = message.partition(", unable to parse")[0].rstrip("."), problem.__cause__.errors()[0]
        ends = [getattr(problem.param, end, None) for end in ("min", "max")]
        if error["type"] in ("greater_than_equal", "less_than_equal") and None not in ends:
            message = f"{message.partition(': should be ')[0]}: should be from {ends[0]} to {ends[1]}"
        if repr(error["input"]) not in message:
            message += f"; got {error['input']!r}"
    unknown = type(problem).__name__ in ("NoSuchOption", "NoSuchCommand") or "No such command" in message
    instead = pointer(words, command, getattr(problem, "option_name", None)) if unknown else ""
    if instead:
        message = f"{message.partition(' (Possible options')[0].rstrip('.')}; instead: {instead}"
    hint = f"\nSee: {context.command_path} --help" if context is not None else ""
    typer.echo(f"error: {message}{hint}", err=True)
    return 2
