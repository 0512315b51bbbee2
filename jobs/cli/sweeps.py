"""What the verbs of runs do with several runs at once: a sweep's members, a chain."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from clipcluster.errors import UserError
from clipcluster.runs.folder import Run
from clipcluster.runs.names import runs_folder
from clipcluster.runs.sweeps import array_folder, find_runs
from jobs.cli.options import say, show

if TYPE_CHECKING:
    from jobs.api import Submission


def all_of(names: Sequence[str], folder: Path, *, chains: bool = False) -> list[Run]:
    """The runs that names mean, of a sweep all members, with `chains` of a chain all runs."""
    return [run for name in names for run in find_runs(name, folder, chains=chains)]


def check_sweep(
    recipe: Path,
    overrides: list[str],
    site: str | None,
    awaited: list[Path],
    deep: bool,
    as_json: bool,
    runs: Path | None,
) -> list[dict[str, Any]] | None:
    """Check the members where the recipe is a sweep; a document for each. None where it is none.

    Without `as_json` what is found is said.
    """
    from clipcluster.recipe.load import load_sweep

    sweep = load_sweep(recipe, overrides, site=site)
    if sweep is None:
        return None
    from jobs.submit import checking
    from jobs.submit.sweep import check_sweep as check
    from jobs.submit.wanted import Awaited, Wanted

    after, told = [Awaited(path) for path in awaited], (lambda text: None) if as_json else say
    wanted = Wanted(recipe, overrides, runs_folder(runs), site, quick=not deep, after=after, say=told)
    found = check(wanted, sweep)
    return [{"name": one.run.name, **checking.document(one.checked)} for one in found]


def awaited_by(
    recipe: Path, overrides: list[str], site: str | None, runs: Path | None
) -> tuple[list[Path], list[str]]:
    """What a recipe's `first` makes and has not made yet, and the keys that are given it, as key=value."""
    from clipcluster.recipe.load import load_chain

    chain = load_chain(recipe, overrides, site=site)
    if not chain.first:
        return [], []
    from jobs import api

    return api.awaited(chain, recipe, runs=runs_folder(runs), site=site)


def say_sweep(submitted: Submission, follow: bool) -> None:
    """What to type about a sweep, or with --follow every change until all its runs have ended."""
    if follow:
        try:
            state = submitted.wait(say=say)
        except KeyboardInterrupt:
            say(f"\nNo longer following; {submitted.name} continues.")
            return
        say(f"{submitted.name}: {state}")
        raise typer.Exit(0 if state == "FINISHED" else 1)
    runs = submitted.path.parent
    typed = submitted.name if runs_folder().absolute() == runs else array_folder(submitted.name, runs)
    say(f"  clipcluster status {typed}")
    say(f"  clipcluster metrics {typed} --by loss    # the best members first")


def logs_of_all(members: Sequence[Run], rank: int, attempt: int | None, following: bool) -> None:
    """What the members of a sweep write, under their names."""
    from jobs.api import Submission
    from jobs.logs import followed, log_files, stream_all
    from jobs.submit.sweep import SHOWN

    sweep = Submission("", members)
    shown: Run | None = None
    missing: list[UserError] = []
    paths = {one.path: followed(one, rank=rank, attempt=attempt) for one in members} if following else {}

    def files(member: Run) -> list[Path]:
        if following:
            return paths[member.path]()
        try:
            return log_files(member, rank=rank, attempt=attempt)
        except UserError as error:  # it has printed nothing yet, or has no such rank or attempt
            missing.append(error)
            return []

    def over() -> bool:
        return not following or all(state.ended for state in sweep.states())

    with suppress(KeyboardInterrupt):
        for member, text in stream_all(members, files, over):
            if member is not shown:
                shown = member
                typer.echo(f"==> {member.name} <==")
            typer.echo(text, nl=False)
    if not following and len(missing) == len(members):
        more = [f"and {len(missing) - SHOWN} more"] if len(missing) > SHOWN else []
        raise UserError("\n".join([*map(str, missing[:SHOWN]), *more]))


def compare(members: Sequence[Run], names: Sequence[str], best: str | None, forms: Sequence[str]) -> None:
    """The members as a table, as CSV or as JSON lines; `forms`: the option of a form that was given."""
    from jobs import compare as comparing

    if set(forms) - {"--csv", "--jsonl"}:
        raise UserError(
            f"metrics: {forms[0]} is for one run; of a sweep there are a table, --csv and --jsonl"
        )
    found = comparing.ranked(members, best) if best else comparing.rows(members)
    wanted = comparing.chosen(found, names) if names else comparing.usual(found)
    chosen = list(dict.fromkeys([*([best] if best else []), *wanted]))
    if forms:
        comparing.write(found, chosen, sys.stdout, kind=forms[0].removeprefix("--"))
    else:
        show(comparing.table(found, chosen))
