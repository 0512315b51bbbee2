"""The command `clipcluster`: verbs, and nothing else."""

from __future__ import annotations

import errno
import os
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from clipcluster.errors import UserError
from clipcluster.runs.folder import all_runs, find_run, runs_folder
from jobs.cli.bench import bench
from jobs.cli.options import AsJson, Runs, group, print_document, say
from jobs.cli.reshard import register
from jobs.cli.sandbox import sandbox
from jobs.cli.shards import shards

# Some versions of typer bring a click of their own, so the class is found, not imported.
UsageProblem: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


app = group("Trains CLIP-style models on preemptible SLURM clusters from one YAML recipe.")
register(shards)
app.add_typer(shards, name="shards")
app.add_typer(sandbox, name="sandbox")
app.add_typer(bench, name="bench")


class Executor(str, Enum):
    """Where a run goes."""

    slurm = "slurm"
    local = "local"
    none = "none"


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys that differ, such as optim.lr=3e-4."),
]
Site = Annotated[str | None, typer.Option("--site", metavar="NAME", help="The site profile.")]
OneRun = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder, its name, or a unique beginning of it.")
]


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also build the towers and decode samples; loads torch.")
    ] = False,
    site: Site = None,
) -> None:
    """Find everything that can be known before queueing."""
    from clipcluster import check as checks

    checked = checks.plain(recipe, overrides or [], site=site)
    for line in checked.summary:
        say(line)
    checked.raise_errors()
    found = [checked.warnings]
    if deep:
        findings = checks.deep(checked.recipe, world_size=checked.plan.world_size if checked.plan else 1)
        for line in findings.summary:
            say(line)
        findings.raise_errors()
        found.append(findings.warnings)
    for warning in (text for warnings in found for text in warnings):
        say(f"warning: {warning}")
    say(f"{recipe}: right" + ("" if deep else " (clipcluster check --deep also tries towers and samples)"))


@app.command()
def submit(
    recipe: RecipeFile,
    overrides: Overrides = None,
    site: Site = None,
    executor: Annotated[
        Executor | None,
        typer.Option(
            "--executor",
            help="Where it runs; none: make the folder only. Default: SLURM where there is one, else here.",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Watch until it ends; Ctrl-C stops watching only.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the deep check.")] = False,
    runs: Runs = None,
) -> None:
    """Start a run, or go on with it: the same recipe finds its run again."""
    from jobs.submit import submit as submission

    submitted = submission.submit(
        submission.Wanted(
            recipe=recipe,
            overrides=overrides or [],
            runs=runs_folder(runs),
            site=site,
            executor=executor.value if executor else None,
            follow=follow,
            dry_run=dry_run,
            quick=quick,
            say=say,
        )
    )
    if dry_run:
        return
    from jobs import follow as following

    console = following.terminal()
    if follow:
        raise typer.Exit(following.follow(submitted.run, console))
    if submitted.job is not None:
        say(f"run folder: {submitted.run.path}")
        say(f"  clipcluster logs -f {following.where(submitted.run)}")
        say(f"  clipcluster status {following.where(submitted.run)}")


@app.command()
def status(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs; default: all there are.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every few seconds.")] = False,
    as_json: AsJson = False,
    runs: Runs = None,
) -> None:
    """Show what every run is doing."""
    from jobs.status import Queue, reports

    folder = runs_folder(runs)

    def look() -> list[Any]:
        chosen = [find_run(name, folder) for name in names] if names else all_runs(folder)
        return reports(chosen, Queue())

    if as_json:
        print_document([report.as_dict() for report in look()])
        return
    from rich.console import Console

    from jobs.cli.tables import status_table

    console = Console(width=None if sys.stdout.isatty() else 200)
    found = look()
    if not found and not watch:
        say(f"no runs in {folder}; make one with: clipcluster submit RECIPE")
        return
    if watch:
        _watch(console, look)
        return
    console.print(status_table(found))
    for report in found:
        if report.advice:
            say(f"{report.name}: {report.advice}")


def _watch(console: Any, look: Any) -> None:
    from rich.live import Live

    from jobs.cli.tables import status_table

    try:
        with Live(status_table(look()), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(5.0)
                live.update(status_table(look()), refresh=True)
    except KeyboardInterrupt:
        return


@app.command()
def logs(
    run: OneRun,
    following: Annotated[
        bool, typer.Option("-f", "--follow", help="Print what comes, until the end.")
    ] = False,
    rank: Annotated[int, typer.Option("--rank", metavar="R", help="Whose log.")] = 0,
    attempt: Annotated[
        int | None, typer.Option("--attempt", metavar="A", help="Of which attempt. Default: the newest.")
    ] = None,
    runs: Runs = None,
) -> None:
    """Print what a rank wrote."""
    from jobs import logs as printing
    from jobs.status import Queue, state_of

    found = find_run(run, runs_folder(runs))

    first = printing.log_files(found, rank=rank, attempt=attempt)

    def paths() -> list[Path]:
        try:
            return printing.log_files(found, rank=rank, attempt=attempt)
        except UserError:
            return first  # the next attempt has begun, and this rank has printed nothing in it yet

    try:
        for text in printing.stream(paths, following=following, ended=lambda: state_of(found, Queue()).ended):
            typer.echo(text, nl=False)
    except KeyboardInterrupt:
        return


@app.command()
def metrics(
    run: OneRun,
    as_csv: Annotated[bool, typer.Option("--csv", help="As CSV (the default).")] = False,
    as_jsonl: Annotated[bool, typer.Option("--jsonl", help="As JSON, one line a step.")] = False,
    runs: Runs = None,
) -> None:
    """Print the metrics of all attempts as one table."""
    from jobs.logs import write_metrics

    if as_csv and as_jsonl:
        raise UserError("metrics: --csv and --jsonl were given; give one of them")
    write_metrics(find_run(run, runs_folder(runs)), sys.stdout, kind="jsonl" if as_jsonl else "csv")


@app.command()
def cancel(
    names: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders, names, or unique beginnings.")
    ],
    runs: Runs = None,
) -> None:
    """End runs for good. Submitting one again goes on from its last checkpoint."""
    from jobs.cancel import cancel as end
    from jobs.status import Queue

    folder = runs_folder(runs)
    queue = Queue()
    for run in [find_run(name, folder) for name in names]:
        say(end(run, queue))


@app.command()
def evaluate(
    what: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run, or a checkpoint's folder.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
    runs: Runs = None,
) -> None:
    """Measure a checkpoint with the run's evaluations, in this process."""
    from jobs.evaluate import evaluate as measure

    document = measure(what, overrides or [], runs_folder(runs))
    if as_json:
        print_document(document)
        return
    from jobs.follow import results_table, terminal

    terminal().print(results_table(document))


@app.command()
def train(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's folder.")],
) -> None:
    """Train in this process, alone or as one rank under torchrun. Nothing restarts it."""
    from clipcluster.runtime.stop import Stop

    stop = Stop()
    stop.install(interactive=True)
    from clipcluster.rank.serve import serve

    code = serve(run_dir, "clipcluster.run:train", stop)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_RIGHTS = "give yourself the right to it, or name another place"
_SPACE = "make space and give the same command again"
_OTHER = "something of another kind has this name; give another"
# What the file system says to a path that somebody typed; all else is a fault of the program.
_REFUSALS = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.ENOTDIR: _OTHER,
    errno.EISDIR: _OTHER,
    errno.EEXIST: _OTHER,
    errno.ENAMETOOLONG: "give a shorter name",
}


def main() -> NoReturn:
    """Run the command; a mistake of the user is one message on stderr and code 2."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        code = 2
    except UsageProblem as problem:
        code = _usage(problem)
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


def _usage(problem: Any) -> int:
    """One message for a command line that cannot be understood."""
    context = getattr(problem, "ctx", None)
    if type(problem).__name__ == "NoArgsIsHelpError":
        if context is not None:
            typer.echo(context.get_help())
        return 2
    message = problem.format_message() if hasattr(problem, "format_message") else str(problem)
    message = message.replace(": Value error, ", ": ")
    hint = f"\nSee: {context.command_path} --help" if context is not None else ""
    typer.echo(f"error: {message}{hint}", err=True)
    return 2
