"""The verbs of runs, from init and check to report and train; the list of all verbs."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from clipcluster.errors import UserError
from clipcluster.runs.names import as_typed, runs_folder
from clipcluster.runs.sweeps import find_runs
from jobs.cli.export import export
from jobs.cli.options import AnyModel, AsJson, Runs, Weights, console, print_document, say, show
from jobs.cli.search import search
from jobs.cli.status import status
from jobs.cli.sweeps import (
    all_of,
    awaited_by,
    check_sweep,
    compare,
    logs_of_all,
    say_sweep,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe to change, such as optim.lr=3e-4."),
]
Site = Annotated[str | None, typer.Option("--site", metavar="NAME", help="The site profile.")]
OneRun = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run's folder, its name, or a unique beginning of its name; or a sweep's name."
    ),
]


def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also build the towers and decode samples (with torch, slower).")
    ] = False,
    site: Site = None,
    as_json: AsJson = False,
    runs: Runs = None,
) -> None:
    """Check a recipe for every error that can be found before its run is queued."""
    gc.disable()  # it would take a twentieth of the time, for a process that ends soon
    try:
        found = _checked(recipe, overrides or [], deep, site, runs, as_json)
    except UserError as error:
        if not as_json:
            raise
        from clipcluster.check.plain import Findings
        from clipcluster.data.storage.urls import addresses_redacted
        from jobs.submit.checking import document

        found = {"recipe": recipe, **document(Findings(errors=[addresses_redacted(str(error))]))}
    finally:
        gc.enable()
    if as_json:
        print_document(found)
        raise typer.Exit(2 if found["errors"] else 0)


def _checked(
    recipe: Path, overrides: list[str], deep: bool, site: str | None, runs: Path | None, as_json: bool
) -> dict[str, Any]:
    """What the check finds; without `as_json` it is said, and errors are raised."""
    from clipcluster.check import plain
    from jobs.submit import checking, executor

    awaited, given = awaited_by(recipe, overrides, site, runs)
    overrides = [*overrides, *given]
    members = check_sweep(recipe, overrides, site, awaited, deep, as_json, runs)
    if members is not None:
        return {"recipe": recipe, "errors": [], "members": members}
    folder = runs_folder(runs)
    checked = plain.check(recipe, overrides, site=site, runs=folder, awaited=awaited)
    checking.complete(checked, checking.run_of(checked, folder), executor.likely(), quick=not deep)
    if not as_json:
        for line in checking.table(checked):
            say(line)
        checked.raise_errors()
        say(f"{recipe}: no problems found")
    return {"recipe": recipe, **checking.document(checked)}


def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the run; NAME.yaml is written here.")],
    parent: Annotated[
        Path | None, typer.Option("--from", metavar="RECIPE", help="Extend this recipe, with other data.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DIR", help="Shards to train on, or a folder with train, val, test."),
    ] = None,
) -> None:
    """Write a first recipe, with comments, for indexed shards."""
    from jobs.init import write_starter

    file, found = write_starter(name, parent=parent, data=data)
    for line in found:
        say(line)
    say(f"wrote {file}")
    say(f"  clipcluster check {file} --deep")
    say(f"  clipcluster submit {file}")


def submit(
    recipe: RecipeFile,
    overrides: Overrides = None,
    site: Site = None,
    executor: Annotated[
        Literal["slurm", "local", "none"] | None,
        typer.Option(
            "--executor",
            help="Where it runs; none: make the run folder only. Default: slurm where set up, else local.",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Watch until it ends; Ctrl-C stops watching only.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done; write nothing.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Skip the deep check.")] = False,
    runs: Runs = None,
) -> None:
    """Start a run, or resume it: the same recipe always means the same run."""
    from jobs import api

    submitted = api.submit(
        recipe,
        overrides or [],
        runs=runs,
        site=site,
        executor=executor,
        follow=follow,
        dry_run=dry_run,
        quick=quick,
        say=say,
    )
    if dry_run:
        return
    if len(submitted.runs) > 1:
        say_sweep(submitted, follow)
    elif follow:
        from jobs import follow as following

        raise typer.Exit(following.follow(submitted.runs[0], console()))
    elif submitted.jobs or submitted.first:
        typed = as_typed(submitted.runs[0])
        say(f"run folder: {submitted.path}")
        say(f"  clipcluster logs -f {typed}")
        say(f"  clipcluster status {typed}")


def logs(
    run: OneRun,
    following: Annotated[
        bool,
        typer.Option("-f", "--follow", help="Keep printing, also in later attempts, until the run ends."),
    ] = False,
    rank: Annotated[int, typer.Option("--rank", metavar="R", help="Whose output, from 0.")] = 0,
    attempt: Annotated[
        int | None, typer.Option("--attempt", metavar="A", help="The attempt. Default: the newest.")
    ] = None,
    runs: Runs = None,
) -> None:
    """Print the output of a rank."""
    from jobs import logs as printing
    from jobs.state import Watched

    members = find_runs(run, runs_folder(runs))
    if len(members) > 1:
        logs_of_all(members, rank, attempt, following)
        return
    found = members[0]
    watched = Watched(found)
    waits = following and not watched.state().ended
    files = [] if waits else printing.log_files(found, rank=rank, attempt=attempt)  # or says what is there
    paths = printing.followed(found, rank=rank, attempt=attempt) if following else lambda: files

    def ended() -> bool:
        over = attempt is not None and found.attempt(attempt).is_stale()
        return not following or over or watched.state().ended

    try:
        for text in printing.stream(paths, ended):
            typer.echo(text, nl=False)
    except KeyboardInterrupt:
        return


def metrics(
    run: OneRun,
    names: Annotated[
        str,
        typer.Option(
            "--columns", metavar="NAME[,NAME]", help="The columns, in this order. Default: a selection."
        ),
    ] = "",
    every: Annotated[
        int | None,
        typer.Option(
            "--every", metavar="N", min=1, help="Only steps that N divides, and the first and the last."
        ),
    ] = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Plot the columns (default: loss) on the terminal.")
    ] = False,
    best: Annotated[
        str | None, typer.Option("--by", metavar="METRIC", help="Of a sweep: the best members by it first.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Plot them into a .png, .pdf or .svg.")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_jsonl: Annotated[bool, typer.Option("--jsonl", help="Print JSON, one line a step.")] = False,
    runs: Runs = None,
) -> None:
    """Print the metrics of all attempts as one table; of a long run a selection of its steps.

    Of a sweep, a line for each member with the last value of each metric.
    """
    from jobs import metrics as printing

    forms = {"--csv": as_csv, "--jsonl": as_jsonl, "--plot": plot, "--picture": picture is not None}
    given = [name for name, wanted in forms.items() if wanted]
    if len(given) > 1:
        raise UserError(f"metrics: {' and '.join(given)} were given; give one of them")
    members = find_runs(run, runs_folder(runs))
    found, wanted = members[0], [name.strip() for name in names.split(",") if name.strip()]
    if len(members) > 1 or best is not None:
        compare(members, wanted, best, [*given, *(["--every"] if every else [])])
        return
    lines = printing.lines_of(found, every=every)
    if as_csv or as_jsonl:
        printing.write(lines, printing.columns(lines, wanted), sys.stdout, kind="csv" if as_csv else "jsonl")
    elif picture is not None:
        printing.picture(printing.curves(lines, wanted), found.name, picture)
        say(f"wrote {picture}")
    elif plot:
        for name, curve in printing.curves(lines, wanted).items():
            say("\n".join(printing.terminal_plot(name, curve)))
    else:
        shown = lines if every is not None else printing.thinned(lines)
        chosen = printing.columns(lines, wanted or printing.usual(lines))
        show(printing.table(shown, chosen))
        if len(shown) < len(lines):
            say(f"{len(shown)} of {len(lines):,} lines; choose with --every N and --columns, all: --csv")


def cancel(
    names: Annotated[list[str], typer.Argument(metavar="RUN", help="Folders, names, or unique beginnings.")],
    runs: Runs = None,
) -> None:
    """End runs: they are not requeued. Submitting one again resumes it from its last checkpoint."""
    from jobs.api import submission
    from jobs.cancel import end_each

    found = [submission(name, runs=runs) for name in names]
    for line in end_each(one.cancel for one in found):
        say(line)


def evaluate(
    what: AnyModel,
    overrides: Overrides = None,
    weights: Weights = None,
    all_of_it: Annotated[
        bool, typer.Option("--all", help="Print every figure with its meaning, not only the headline.")
    ] = False,
    as_json: AsJson = False,
    runs: Runs = None,
) -> None:
    """Measure a model in this process, by the evaluations of its run's recipe; nothing is written to the run.

    For another program's model name the shards: 'evaluate.zero_shot=[FOLDER]' 'evaluate.retrieval=[FOLDER]'.
    """
    from jobs.evaluate import evaluate as measure

    document = measure(what, overrides or [], runs_folder(runs), weights)
    if as_json:
        print_document(document)
        return
    from jobs.evaluate import shown

    show(shown(document, all_of_it=all_of_it))


def report(
    names: Annotated[list[str], typer.Argument(metavar="RUN", help="Folders, names, or unique beginnings.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.html", help="The file to write, or to replace.")
    ],
    runs: Runs = None,
) -> None:
    """Write one HTML file about a run, or about several beside each other."""
    from jobs.report.report import write
    from jobs.state import Queue

    folder = runs_folder(runs)
    chosen = {found.path.resolve(): found for found in all_of(names, folder)}
    size = write(list(chosen.values()), out, Queue())
    say(f"wrote {out} ({max(1, size // 1000):,} kB): open it in a browser")


def train(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's folder.")],
) -> None:
    """Train in this process, alone or as one rank under torchrun. Nothing restarts it."""
    from clipcluster.runtime.outcome import leave
    from clipcluster.runtime.stop import Stop

    stop = Stop()
    stop.install(interactive=True)
    from clipcluster.rank.serve import serve

    leave(serve(run_dir, "clipcluster.run:train", stop))


VERBS = (init, check, submit, status, logs, metrics, cancel, evaluate, report, search, export, train)
