"""The verbs `clipcluster shards …`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from clipcluster.text import counted
from jobs.cli.convert import conversion_command, convert, local_path, summary_line
from jobs.cli.options import AsJson, group, print_document, say, show
from jobs.cli.progress import progress_bar

_SHOWN = 20  # faults that are printed one by one


_folder = local_path("DIR", "copy the shards here first")
Folders = Annotated[
    list[Path], typer.Argument(metavar="DIR", parser=_folder, help="Folders of shards of this machine.")
]
Elsewhere = Annotated[
    Path | None, typer.Option("--index", metavar="FOLDER", help="Where the index of the one DIR is.")
]
Images = Annotated[
    bool,
    typer.Option("--images/--no-images", help="Decode every image, or only recognise its format."),
]
Workers = Annotated[int, typer.Option("--workers", metavar="N", min=1, help="Processes.")]


_RESHARD = """Write samples of shards into others: a subset, a filter, several folders, another size of shard.

Conditions are applied in the order of this list. A sample is copied byte for byte, with all its members; the
same command continues where it stopped.
"""
_NOT_OF_RESHARD = ("resize", "resize_mode", "quality", "executor", "jobs", "site", "cluster")


class _Verbs(typer.core.TyperGroup):
    """The verbs below, and `reshard`, which is built from its reader when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the help."""
        return [*super().list_commands(ctx), "reshard"]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of one verb, or None."""
        if cmd_name != "reshard":
            return super().get_command(ctx, cmd_name)
        from tools.convert.readers.shards import KIND, index_as_before

        command = conversion_command("shards", KIND, _RESHARD, _NOT_OF_RESHARD, index_as_before)
        command.name = cmd_name
        return command


shards = group("Shards of samples, and their indexes.", cls=_Verbs)
shards.add_typer(convert, name="convert")


@shards.command()
def index(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="DIR", help="Folders of shards; or one address, or pipe:COMMAND."),
    ],
    elsewhere: Annotated[
        Path | None, typer.Option("--index", metavar="FOLDER", help="Put the index elsewhere.")
    ] = None,
    captions: Annotated[
        list[str] | None,
        typer.Option(
            "--captions",
            metavar="CHOICE",
            help="Count these too: default, lines, txt, json:FIELD, MEMBER.json:FIELD; repeatable.",
        ),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Scan what looks unchanged too.")] = False,
    workers: Workers = 1,
    as_json: AsJson = False,
) -> None:
    """Make the index that training reads samples by."""
    from tools.shards.index import index_folders

    with progress_bar(quiet=as_json) as progress:
        summaries = index_folders(
            folders, index=elsewhere, captions=captions, again=again, workers=workers, progress=progress
        )
    if as_json:
        print_document([asdict(summary) for summary in summaries])
        return
    for summary in summaries:
        say(summary_line(summary))


@shards.command()
def verify(
    folders: Folders,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="First repair what can be repaired without losing data, and report it."
        ),
    ] = False,
    elsewhere: Elsewhere = None,
    images: Images = True,
    workers: Workers = 1,
    as_json: AsJson = False,
) -> None:
    """Read every byte again and compare with the index; exit 1 where something is broken."""
    from tools.shards.index import every_folder
    from tools.shards.repair import repair_folder
    from tools.shards.verify import verify as read

    folders = [Path(folder) for folder in every_folder(folders, elsewhere)]
    reports = []
    for folder in folders:
        deeds = []
        if repair:
            with progress_bar(f"{folder}: checking") as progress:
                deeds = repair_folder(folder, elsewhere, workers=workers, progress=progress)
        for deed in () if as_json else deeds:  # now: what follows may end with a message
            say(f"{'repaired' if deed.done else 'left  '}  {deed.file}: {deed.what}")
        with progress_bar(str(folder)) as progress:
            report = read(folder, elsewhere, images=images, workers=workers, progress=progress)
        report.repairs = [deed._asdict() for deed in deeds]
        reports.append(report)
        if not as_json:
            _say_report(report)
    if as_json:
        _print([report.as_dict() for report in reports])
    if not all(report.whole for report in reports):
        raise typer.Exit(1)


@shards.command()
def stats(
    folders: Folders,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE.png", help="Draw the figures into this file.")
    ] = None,
    elsewhere: Elsewhere = None,
    captions: Annotated[
        str | None,
        typer.Option("--captions", metavar="CHOICE", help="Which captions; default: those of the index."),
    ] = None,
    images: Images = True,
    workers: Workers = 1,
    as_json: AsJson = False,
) -> None:
    """Describe shards: samples, images, captions, duplicates, what cannot be read."""
    from jobs.cli.tables import stats_table
    from tools.shards.index import every_folder
    from tools.shards.stats import stats as read_any

    folders = [Path(folder) for folder in every_folder(folders, elsewhere)]
    if picture is not None:
        from tools.shards.stats_plot import draw, require_drawable

        require_drawable(picture)
    read = partial(read_any, captions_choice=captions, images=images, workers=workers)
    figures = []
    for folder in folders:
        with progress_bar(str(folder)) as progress:
            figures.append(read(folder, elsewhere, progress=progress))
        if not as_json:
            show(stats_table(figures[-1]))
    if picture is not None:
        draw(figures, picture)
        if not as_json:
            say(f"drawn: {picture}")
    if as_json:
        _print([asdict(one) for one in figures])


def _print(documents: list[dict[str, Any]]) -> None:
    """One folder's document as it is, those of several as a list."""
    print_document(documents[0] if len(documents) == 1 else documents)


def _say_report(report: Any) -> None:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in report.kinds.items()) or "no image"
    bad = f"{counted(len(report.broken), 'broken shard')}, {counted(len(report.bad), 'bad sample')}"
    say(
        f"{report.folder}: {counted(report.samples, 'sample')} ({kinds}) with "
        f"{counted(report.captions, 'caption')} in {counted(report.shards, 'shard')}, "
        f"{'whole' if report.whole else bad}"
    )
    faults = [*report.broken, *report.bad]
    for fault in faults[:_SHOWN]:
        where = fault["shard"] if fault["key"] is None else f"{fault['shard']} {fault['key']}"
        say(f"  {where}: {fault['reason']}")
    if len(faults) > _SHOWN:
        say(f"  … and {len(faults) - _SHOWN} more; --json names all")
    for note in report.notes:
        say(f"  note: {note}")
