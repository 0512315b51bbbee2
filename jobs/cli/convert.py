"""The verb `clipcluster shards convert`: a sub-command for every kind, its options those of its reader."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from clipcluster.data.storage.urls import is_remote, redacted
from clipcluster.errors import UserError
from clipcluster.runs.files import read_lines
from clipcluster.text import counted
from jobs.cli.options import SETTINGS, AsJson, group, print_document, say
from jobs.cli.progress import progress_bar


def local_path(name: str, advice: str) -> Callable[[str], Path]:
    """A parser of the paths of this machine that `name` takes. UserError, with advice: an address."""

    def path(typed: str) -> Path:
        if is_remote(typed):
            raise UserError(f"{name} {redacted(typed)}: not a path of this machine; {advice}")
        return Path(typed)

    return path


_INPUT = local_path("INPUT", "copy the data here first")
_OUT = local_path("--out", "give a folder of this machine, and copy it there afterwards")


class Kinds(typer.core.TyperGroup):
    """The kinds as sub-commands, each built from its reader when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The kinds."""
        from tools.convert.convert import KINDS

        return list(KINDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The sub-command of one kind. UserError: there is no such kind."""
        from tools.convert.convert import kind_named

        kind = kind_named(cmd_name)
        return conversion_command(cmd_name, kind, kind.help)


convert = group(
    "Convert data into indexed shards; continues where it stopped, leaves a finished folder unchanged.",
    cls=Kinds,
    callback=lambda: None,  # makes a group although no command is registered
    subcommand_metavar="KIND [INPUT]... --out DIR",
)


_parameter = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)


def conversion_command(
    name: str,
    kind: Any,
    text: str,
    leave_out: Sequence[str] = (),
    after: Callable[[list[Path], Path], object] = lambda inputs, out: None,
) -> Any:
    """A command that converts one kind: its inputs, its reader's options, those of every conversion.

    `text` is its help; `leave_out` names options of every conversion that it has not. `after` is called with
    the inputs and the output folder when the shards are there.
    """
    from tools.convert.plan import Settings

    own, common = _options(kind.options), [one for one in _options(Settings) if one.name not in leave_out]

    def run(**given: Any) -> None:
        options = kind.options(**_taken(given, own))
        settings = Settings(**_taken(given, common))
        _convert(name, given.pop("inputs", []), options, settings, after, **given)

    inputs = typer.Argument(metavar="INPUT", help=kind.inputs, parser=_INPUT)
    every = inspect.signature(_convert, eval_str=True).parameters.values()
    out, *other = [one for one in every if one.kind is one.KEYWORD_ONLY and one.name not in leave_out]
    parameters = [
        *([_parameter("inputs", annotation=Annotated[list[Path], inputs])] if kind.inputs else []),
        out,
        *own,
        *common,
        *other,
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    app = typer.Typer(add_completion=False, context_settings=SETTINGS)
    app.command(name=name, help=text)(run)
    return typer.main.get_command(app)


def _options(form: Any) -> list[inspect.Parameter]:
    """An option for each field of a dataclass; a tuple becomes one that may be repeated."""
    types = typing.get_type_hints(form)
    found = []
    for field in dataclasses.fields(form):
        kind = types[field.name]
        default: Any = field.default
        flag = field.metadata.get("flag", "--" + field.name.replace("_", "-"))
        if kind is bool:
            flag = f"{flag}/--no-{flag[2:]}"
        if typing.get_origin(kind) is tuple:
            kind, default = list[typing.get_args(kind)[0]], list(default)  # type: ignore[misc]
        more = {name: value for name, value in field.metadata.items() if name != "flag"}
        option: Any = Annotated[kind, typer.Option(flag, **more)]
        found.append(_parameter(field.name, annotation=option, default=default))
    return found


def _taken(given: dict[str, Any], options: Sequence[inspect.Parameter]) -> dict[str, Any]:
    """The values of these options, taken out of `given`."""
    values = {one.name: given.pop(one.name) for one in options}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _convert(
    name: str,
    inputs: list[Path],
    options: Any,
    settings: Any,
    after: Callable[[list[Path], Path], object],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to make.", parser=_OUT)],
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", min=1, help="Processes. Default: one a core.")
    ] = None,
    executor: Annotated[
        Literal["local", "slurm"],
        typer.Option("--executor", metavar="WHERE", help="local, or slurm: an array of jobs."),
    ] = "local",
    jobs: Annotated[
        int | None, typer.Option("--jobs", metavar="N", min=1, help="slurm: tasks of the array. Default: 4.")
    ] = None,
    site: Annotated[
        str | None, typer.Option("--site", metavar="NAME", help="slurm: the site profile.")
    ] = None,
    cluster: Annotated[
        list[str] | None,
        typer.Option("--cluster", metavar="KEY=VALUE", help="slurm: as in a recipe, such as partition=low."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Converts and says what became of it; the keywords are options of the command."""
    from tools.convert.convert import convert

    if executor == "slurm":
        if workers is not None:
            raise UserError(f"--workers {workers}: on slurm every task is one process; give --jobs instead")
        conversion = name, out.absolute(), [path.absolute() for path in inputs], options, settings
        _queue(conversion, jobs or 4, site, cluster or [], as_json)
        return
    for option, value in (("--jobs", jobs), ("--site", site), ("--cluster", cluster)):
        if value:
            raise UserError(f"{option} goes with --executor slurm; on this machine give --workers")
    if out.is_dir():
        from jobs.convert import refuse_running

        refuse_running(out)
    workers = workers or len(os.sched_getaffinity(0))
    with progress_bar(quiet=as_json) as progress:
        done = convert(name, out, inputs, options, settings, workers=workers, progress=progress)
    after(inputs, out)
    _report(done, as_json)
    _refuse_empty(done)
    if not as_json:
        say(f"{out}: " + ("made" if done.made else "complete already"))


def _report(done: Any, as_json: bool) -> None:
    if as_json:
        splits = {split: dataclasses.asdict(summary) for split, summary in done.splits.items()}
        document = {"out": str(done.out), "made": done.made, "splits": splits, "bad": done.bad}
        if done.accounts:
            document["accounts"] = {
                split: {name.strip(): count for name, count in account}
                for split, account in done.accounts.items()
            }
        print_document(document)
        return
    for note in done.notes:
        say(note)
    for split, summary in done.splits.items():
        bad = f", {done.bad[split]:,} bad ones left out: {summary.folder}/bad_samples.jsonl"
        say(summary_line(summary) + (bad if done.bad[split] else ""))
        for name, count in done.accounts.get(split, ()):
            say(f"  {name:<32} {count:>12,}")


def _refuse_empty(done: Any) -> None:
    """UserError, with the first reason, where all samples were bad ones: mostly a wrong option."""
    summaries = done.splits.values()
    if any(summary.samples for summary in summaries) or not any(done.bad.values()):
        return
    first = next(one for made in summaries for one in read_lines(Path(made.folder, "bad_samples.jsonl")))
    raise UserError(
        f"{done.out}: none of the {sum(done.bad.values()):,} samples can be used; the first one, "
        f"{first['key']}: {first['reason']}. Remove the folder and convert again with other options"
    )


def _queue(
    conversion: Sequence[Any], jobs: int, site: str | None, cluster: Sequence[str], as_json: bool
) -> None:
    """Hand the conversion to SLURM, and say how to follow it."""
    from clipcluster.recipe.load import load_cluster
    from jobs.convert import FOLDER, ConvertJob, submit
    from jobs.submit.executor import require_slurm

    require_slurm()
    job = ConvertJob(*conversion)
    ids = submit(job, load_cluster(["gpus_per_node=0", *cluster], site=site), jobs)
    if as_json:
        print_document({"out": str(job.out), "jobs": ids})
    elif not ids:
        say(f"{job.out}: complete already")
    else:
        logs = job.out / FOLDER / "submitit"
        say(f"{job.out}: job {ids[0].split('_')[0]}, {len(ids)} tasks; logs in {logs}")
        say("Run the same command again to see whether it is complete; it continues where a task failed.")


def summary_line(made: Any) -> str:
    """One line for the index of one folder."""
    what = f"{counted(made.samples, 'sample')} with {counted(made.captions, 'caption')}"
    text = f"{made.folder}: {what} in {counted(made.shards, 'shard')}"
    for count, what in (
        (made.without_caption, "without a caption"),
        (made.without_image, "without an image"),
        (made.duplicates, "left out because their key came before"),
    ):
        text += f", {count:,} {what}" if count else ""
    for choice, counts in list(made.choices.items())[1:]:
        text += f"; {choice}: {counted(counts.captions, 'caption')}, "
        text += f"{counted(counts.without_caption, 'sample')} without"
    for fault in made.broken:
        text += f"\n  {fault['shard']}: {fault['reason']}; the samples before it are used"
    if made.left_out:
        text += f"\n  compressed, cannot be read by offset, left out: {', '.join(made.left_out)}"
    return text
