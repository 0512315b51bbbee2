"""The command `clipcluster`: verbs, and nothing else."""

from __future__ import annotations

import json
import os
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from clipcluster.errors import UserError
from clipcluster.runs.folder import all_runs, find_run, runs_folder

SETTINGS = {"help_option_names": ["-h", "--help"]}
# Some versions of typer bring a click of their own, so the class is found, not imported.
UsageProblem: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def _group(text: str) -> typer.Typer:
    return typer.Typer(
        help=text,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings=SETTINGS,
    )


app = _group("Trains CLIP-style models on preemptible SLURM clusters from one YAML recipe.")
shards = _group("Shards of samples, and their indexes.")
sandbox = _group("A throwaway SLURM cluster of several nodes on this machine, for tests and demonstrations.")
app.add_typer(shards, name="shards")
app.add_typer(sandbox, name="sandbox")


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
Runs = Annotated[
    Path | None,
    typer.Option("--runs", metavar="DIR", help="Where runs live. Default: $CLIPCLUSTER_RUNS, else ./runs"),
]
Site = Annotated[str | None, typer.Option("--site", metavar="NAME", help="The site profile.")]
OneRun = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder, its name, or a unique beginning of it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
SandboxFolder = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", help="Its folder. Default: $CLIPCLUSTER_SANDBOX, else ./sandbox"),
]


def _print(text: str) -> None:
    typer.echo(text)


def _document(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))  # paths, times


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
        _print(line)
    checked.raise_errors()
    found = [checked.warnings]
    if deep:
        findings = checks.deep(checked.recipe, world_size=checked.plan.world_size if checked.plan else 1)
        for line in findings.summary:
            _print(line)
        findings.raise_errors()
        found.append(findings.warnings)
    for warning in (text for warnings in found for text in warnings):
        _print(f"warning: {warning}")
    _print(f"{recipe}: right" + ("" if deep else " (clipcluster check --deep also tries towers and samples)"))


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
    from jobs import submit as submission

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
            say=_print,
        )
    )
    if dry_run:
        return
    from jobs import follow as following

    console = following.terminal()
    if follow:
        raise typer.Exit(following.follow(submitted.run, console))
    if submitted.job is not None:
        _print(f"run folder: {submitted.run.path}")
        _print(f"  clipcluster logs -f {following.where(submitted.run)}")
        _print(f"  clipcluster status {following.where(submitted.run)}")


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
        _document([report.as_dict() for report in look()])
        return
    from rich.console import Console

    from jobs.show import status_table

    console = Console(width=None if sys.stdout.isatty() else 200)
    found = look()
    if not found and not watch:
        _print(f"no runs in {folder}; make one with: clipcluster submit RECIPE")
        return
    if watch:
        _watch(console, look)
        return
    console.print(status_table(found))
    for report in found:
        if report.advice:
            _print(f"{report.name}: {report.advice}")


def _watch(console: Any, look: Any) -> None:
    from rich.live import Live

    from jobs.show import status_table

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
        _print(end(run, queue))


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
        _document(document)
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
    from clipcluster import rank

    code = rank.serve(run_dir, "clipcluster.run:train", stop)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
        _document(
            {"out": str(out), "made": done.made, "splits": {n: asdict(s) for n, s in done.splits.items()}}
        )
        return
    for summary in done.splits.values():
        _print(_summary(summary))
    _print(f"{out}: " + ("made" if done.made else "was there already, whole"))


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
        _print(_summary(summary))


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
        _document([report.as_dict() for report in reports])
    else:
        for report in reports:
            _print(
                f"{report.folder}: {report.samples:,} samples in {report.shards} shards, "
                + ("whole" if report.whole else f"{len(report.broken)} broken, {len(report.bad)} bad")
            )
            for fault in [*report.broken, *report.bad][:20]:
                _print(f"  {fault['shard']} {fault['key'] or ''}: {fault['reason']}")
    if not all(report.whole for report in reports):
        raise typer.Exit(1)


def _sandbox_folder(folder: Path | None) -> Path:
    from tools import sandbox as sandboxes

    return folder or sandboxes.default_folder()


@sandbox.command("start")
def sandbox_start(
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", help="How many nodes.")] = 4,
    cpus: Annotated[int, typer.Option("--cpus", metavar="N", help="CPUs that each claims to have.")] = 4,
    grace: Annotated[
        int, typer.Option("--grace", metavar="S", help="GraceTime of the low partition, seconds.")
    ] = 10,
    kill_wait: Annotated[int, typer.Option("--kill-wait", metavar="S", help="KillWait, seconds.")] = 5,
    user_signal: Annotated[
        bool, typer.Option("--user-signal", help="A preemption sends USR2 (preempt_send_user_signal).")
    ] = False,
    folder: SandboxFolder = None,
) -> None:
    """Start it, and say which line points a shell at it."""
    from tools import sandbox as sandboxes

    started = sandboxes.start(
        _sandbox_folder(folder),
        nodes=nodes,
        cpus=cpus,
        grace_seconds=grace,
        kill_wait_seconds=kill_wait,
        user_signal=user_signal,
    )
    _print(f"# {nodes} nodes, partitions low (preemptible) and high; point this shell at them with:")
    _print(started.shell_line)


@sandbox.command("stop")
def sandbox_stop(
    keep_logs: Annotated[bool, typer.Option("--keep-logs", help="Keep the daemons' logs.")] = False,
    folder: SandboxFolder = None,
) -> None:
    """Stop it and remove its folder."""
    from tools import sandbox as sandboxes

    chosen = _sandbox_folder(folder)
    ended = sandboxes.stop(chosen, keep_logs=keep_logs)
    _print(f"{chosen}: {ended} processes ended")


@sandbox.command("status")
def sandbox_status(folder: SandboxFolder = None, as_json: AsJson = False) -> None:
    """Show its nodes and jobs."""
    from dataclasses import asdict

    from tools import sandbox as sandboxes

    found = sandboxes.status(_sandbox_folder(folder))
    if as_json:
        document = {
            "folder": str(found.sandbox.folder),
            "running": found.running,
            "nodes": [asdict(node) for node in found.nodes],
            "jobs": [asdict(job) for job in found.jobs],
        }
        _document(document)
        return
    _print(f"{found.sandbox.folder}: " + ("running" if found.running else "not running"))
    for node in found.nodes:
        _print(f"  {node.name}: {node.state}" + ("" if node.responding else ", not responding"))
    for job in found.jobs:
        _print(
            f"  job {job.job_id} {job.name}: {job.state} in {job.partition} on {', '.join(job.nodes) or '-'}"
        )


@sandbox.command("preempt")
def sandbox_preempt(
    run: Annotated[str, typer.Argument(metavar="RUN|JOB", help="A run, or a job's id.")],
    hold: Annotated[
        float, typer.Option("--hold", metavar="S", help="How long the other job keeps the nodes, seconds.")
    ] = 0,
    come_back: Annotated[
        bool, typer.Option("--come-back/--no-come-back", help="Let it start again at once.")
    ] = True,
    folder: SandboxFolder = None,
    runs: Runs = None,
) -> None:
    """Evict a running job by one of higher priority, and let it come back."""
    from tools import sandbox as sandboxes

    job: str | Path = run
    if not sandboxes.JOB_ID.fullmatch(run):
        job = find_run(run, runs_folder(runs)).path
    done = sandboxes.preempt(_sandbox_folder(folder), job, come_back=come_back, hold_seconds=hold)
    _print(
        f"job {done.job_id} left {', '.join(done.nodes)} after {done.evicted_after:.1f} s; "
        + ("requeued" if done.requeued else f"not requeued: {done.state}")
    )


NodeName = Annotated[str, typer.Argument(metavar="NODE", help="A node, such as n2.")]


@sandbox.command("kill-node")
def sandbox_kill_node(node: NodeName, folder: SandboxFolder = None) -> None:
    """Kill a node: slurmd, step daemons and tasks at once, as when a machine loses its power."""
    from tools import sandbox as sandboxes

    ended = sandboxes.kill_node(_sandbox_folder(folder), node)
    _print(f"{node}: {ended} processes killed; SLURM notices after about 25 s")


@sandbox.command("lose-node")
def sandbox_lose_node(node: NodeName, folder: SandboxFolder = None) -> None:
    """Kill a node's slurmd alone: to SLURM the node is gone, its ranks live on."""
    from tools import sandbox as sandboxes

    sandboxes.lose_node(_sandbox_folder(folder), node)
    _print(f"{node}: slurmd killed, its ranks live on; SLURM notices after about 25 s")


@sandbox.command("restore-node")
def sandbox_restore_node(node: NodeName, folder: SandboxFolder = None) -> None:
    """Start a node's slurmd again, and wait until SLURM can use it."""
    from tools import sandbox as sandboxes

    sandboxes.restore_node(_sandbox_folder(folder), node)
    _print(f"{node}: up")


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


if __name__ == "__main__":
    main()
