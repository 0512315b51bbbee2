"""The verb `clipcluster shards convert`: a sub-command for every kind, its options those of its reader."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from clipcluster.errors import UserError
from clipcluster.text import counted
from jobs.cli.options import SETTINGS, AsJson, print_document, say
from jobs.cli.progress import progress_bar

_COMMON = {
    "out": Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to make.")],
    "samples_per_shard": Annotated[
        int | None,
        typer.Option("--samples-per-shard", metavar="N", min=1, help="Default: 10,000 (digits: 256)."),
    ],
    "bytes_per_shard": Annotated[
        str | None,
        typer.Option("--bytes-per-shard", metavar="SIZE", help="Such as '1 GB', counted by image sizes."),
    ],
    "shuffle": Annotated[
        int | None,
        typer.Option("--shuffle", metavar="SEED", help="Write in a shuffled order. Default: the input's."),
    ],
    "resize": Annotated[
        int | None,
        typer.Option(
            "--resize", metavar="SIDE", min=1, help="Shrink larger images (pixels). Default: never re-encode."
        ),
    ],
    "resize_mode": Annotated[
        str,
        typer.Option(
            "--resize-mode",
            metavar="MODE",
            help="SIDE is the largest side: keep_ratio, the smallest: keep_ratio_smallest, both: square.",
        ),
    ],
    "quality": Annotated[
        int, typer.Option("--quality", metavar="Q", min=1, max=100, help="Of resized JPEG and WebP.")
    ],
    "workers": Annotated[
        int | None, typer.Option("--workers", metavar="N", min=1, help="Processes. Default: one a core.")
    ],
    "executor": Annotated[
        str, typer.Option("--executor", metavar="WHERE", help="local, or slurm: an array of jobs.")
    ],
    "jobs": Annotated[
        int | None, typer.Option("--jobs", metavar="N", min=1, help="slurm: tasks of the array. Default: 4.")
    ],
    "site": Annotated[str | None, typer.Option("--site", metavar="NAME", help="slurm: the site profile.")],
    "cluster": Annotated[
        list[str] | None,
        typer.Option("--cluster", metavar="KEY=VALUE", help="slurm: as in a recipe, such as partition=low."),
    ],
    "as_json": AsJson,
}
_DEFAULTS = {
    "out": inspect.Parameter.empty,
    "as_json": False,
    "executor": "local",
    "resize_mode": "keep_ratio",
    "quality": 95,
}


class Kinds(typer.core.TyperGroup):
    """The kinds as sub-commands, each built from its reader when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The kinds."""
        from tools.convert.convert import KINDS

        return list(KINDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The sub-command of one kind. UserError: there is no such kind."""
        from tools.convert.convert import kind_named

        return _command(cmd_name, kind_named(cmd_name))


convert = typer.Typer(
    help="Convert data into indexed shards; continues where it stopped, leaves a finished folder unchanged.",
    cls=Kinds,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
    subcommand_metavar="KIND [INPUT]... --out DIR",
)


@convert.callback()
def _group() -> None:
    """Makes typer build a group although no command is registered."""


def _command(name: str, kind: Any) -> Any:
    """The sub-command of one kind, for a group."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=SETTINGS)
    app.command(name=name, help=kind.help)(conversion_command(name, kind))
    return typer.main.get_command(app)


def conversion_command(
    name: str,
    kind: Any,
    common: Sequence[str] = tuple(_COMMON),
    after: Callable[[list[Path], Path], object] = lambda inputs, out: None,
) -> Callable[..., None]:
    """The function behind a command that converts: inputs, its reader's options, the `common` ones.

    `after` is called with the inputs and the output folder when the shards are there.
    """
    own = [field.name for field in dataclasses.fields(kind.options)]

    def run(**given: Any) -> None:
        values = {key: given.pop(key) for key in own}
        options = kind.options(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        )
        run_conversion(name, given.pop("inputs", None) or [], options, after=after, **given)

    inputs = Annotated[list[Path], typer.Argument(metavar="INPUT...", help=kind.inputs)]
    parameters: dict[str, tuple[Any, Any]] = {
        **({"inputs": (inputs, ...)} if kind.inputs else {}),
        **_own_options(kind),
        **{key: (_COMMON[key], _DEFAULTS.get(key)) for key in common},
    }
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for key, (annotation, default) in parameters.items()
        ]
    )
    run.__annotations__ = {key: annotation for key, (annotation, _) in parameters.items()}
    return run


def _own_options(kind: Any) -> dict[str, tuple[Any, Any]]:
    """Type and default of each of the reader's options; a tuple becomes an option that may be repeated."""
    types = typing.get_type_hints(kind.options)
    found = {}
    for field in dataclasses.fields(kind.options):
        default: Any = field.default
        flag = field.metadata.get("flag") or "--" + field.name.replace("_", "-")
        kind_of_value = types[field.name]
        if kind_of_value is bool:
            flag = f"{flag}/--no-{flag[2:]}"
        if typing.get_origin(kind_of_value) is tuple:
            kind_of_value, default = list[typing.get_args(kind_of_value)[0]], list(default)  # type: ignore[misc]
        option = typer.Option(flag, metavar=field.metadata.get("metavar"), help=field.metadata.get("help"))
        found[field.name] = (Annotated[kind_of_value, option], default)
    return found


def run_conversion(
    name: str,
    inputs: list[Path],
    options: Any,
    *,
    out: Path,
    bytes_per_shard: str | None,
    workers: int | None,
    executor: str = "local",
    jobs: int | None = None,
    site: str | None = None,
    cluster: list[str] | None = None,
    as_json: bool,
    after: Callable[[list[Path], Path], object] = lambda inputs, out: None,
    **settings: Any,
) -> None:
    """Converts and says what became of it; `after` is called when the shards are there."""
    from tools.convert import convert as conversion

    wanted = conversion.Settings(bytes_per_shard=_bytes(bytes_per_shard), **settings)
    if executor == "slurm":
        if workers is not None:
            raise UserError(f"--workers {workers}: on slurm every task is one process; give --jobs instead")
        _queue(name, out, inputs, options, wanted, jobs or 4, site, cluster or [], as_json)
        return
    _refuse_for_slurm_alone(executor, jobs, site, cluster)
    _refuse_running(out)
    with progress_bar(quiet=as_json) as progress:
        done = conversion.convert(
            name,
            out,
            inputs,
            options,
            wanted,
            workers=workers or len(os.sched_getaffinity(0)),
            progress=progress,
        )
    after(inputs, out)
    if as_json:
        splits = {split: dataclasses.asdict(summary) for split, summary in done.splits.items()}
        document = {"out": str(out), "made": done.made, "splits": splits, "bad": done.bad}
        if done.accounts:
            document["accounts"] = {
                split: {name.strip(): count for name, count in account}
                for split, account in done.accounts.items()
            }
        print_document(document)
        _refuse_empty(done)
        return
    for note in done.notes:
        say(note)
    for split, summary in done.splits.items():
        bad = f", {done.bad[split]:,} bad ones left out: {summary.folder}/bad_samples.jsonl"
        say(summary_line(summary) + (bad if done.bad[split] else ""))
        for name, count in done.accounts.get(split, ()):
            say(f"  {name:<32} {count:>12,}")
    _refuse_empty(done)
    say(f"{out}: " + ("made" if done.made else "complete already"))


def _refuse_empty(done: Any) -> None:
    """UserError, with the first reason, where all samples were bad ones: mostly a wrong option."""
    if any(summary.samples for summary in done.splits.values()) or not any(done.bad.values()):
        return
    lists = [Path(summary.folder) / "bad_samples.jsonl" for summary in done.splits.values()]
    with open(next(path for path in lists if path.exists()), encoding="utf-8") as file:
        first = json.loads(file.readline())
    raise UserError(
        f"{done.out}: none of the {sum(done.bad.values()):,} samples can be used; the first one, "
        f"{first['key']}: {first['reason']}. Remove the folder and convert again with other options"
    )


def _queue(
    name: str,
    out: Path,
    inputs: list[Path],
    options: Any,
    settings: Any,
    jobs: int,
    site: str | None,
    cluster: list[str],
    as_json: bool,
) -> None:
    """Hand the conversion to SLURM, and say how to follow it."""
    from clipcluster.recipe.load import load_cluster
    from jobs import convert as array
    from jobs.submit.executor import require_slurm

    require_slurm()
    order = array.ConvertJob(name, out.absolute(), [path.absolute() for path in inputs], options, settings)
    ids = array.submit(order, load_cluster(["gpus_per_node=0", *cluster], site=site), jobs)
    if as_json:
        print_document({"out": str(out), "jobs": ids})
    elif not ids:
        say(f"{out}: complete already")
    else:
        logs = out / array.FOLDER / "submitit"
        say(f"{out}: job {ids[0].split('_')[0]}, {len(ids)} tasks; logs in {logs}")
        say("Run the same command again to see whether it is complete; it continues where a task failed.")


def _refuse_for_slurm_alone(executor: str, jobs: Any, site: Any, cluster: Any) -> None:
    if executor != "local":
        raise UserError(f"--executor {executor}: allowed are local and slurm")
    for option, value in (("--jobs", jobs), ("--site", site), ("--cluster", cluster)):
        if value:
            raise UserError(f"{option} goes with --executor slurm; on this machine give --workers")


def _refuse_running(out: Path) -> None:
    """UserError while an array of jobs writes into `out`."""
    if not out.is_dir():
        return
    from jobs import convert as array

    if (out / array.FOLDER).is_dir():
        array.refuse_running(out)


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


def _bytes(text: str | None) -> int | None:
    """Bytes of `1 GB`, `500 MB`; the units are those of the recipe."""
    if text is None:
        return None
    from clipcluster.recipe.units import Memory

    try:
        return int(Memory.parse(text).megabytes) << 20
    except ValueError as error:
        raise UserError(f"--bytes-per-shard {text!r}: {str(error).replace('memory', 'a size')}") from None
