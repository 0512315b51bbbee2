"""The verbs `clipcluster shards stats`, `verify` and `reshard`: what is in shards, and other shards of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from clipcluster.errors import UserError
from jobs.cli.options import AsJson, print_document, say

_SHOWN = 20  # faults that are printed one by one


def _local(folder: str) -> Path:
    """A folder of this machine. UserError: an address, or a command."""
    if "://" in folder or folder.startswith("pipe:"):
        raise UserError(f"{folder}: only folders of this machine; copy the shards first")
    return Path(folder)


Folders = Annotated[
    list[Path], typer.Argument(metavar="DIR...", parser=_local, help="Folders of shards of this machine.")
]
Elsewhere = Annotated[
    Path | None, typer.Option("--index", metavar="FOLDER", help="Where the index of the one DIR is.")
]
Images = Annotated[
    bool,
    typer.Option("--images/--no-images", help="Decode every image, or only recognise its format."),
]
Workers = Annotated[int, typer.Option("--workers", metavar="N", min=1, help="Processes.")]


def register(group: typer.Typer) -> None:
    """Adds the verbs of this file to `clipcluster shards`."""
    for verb in (verify, reshard, stats):
        group.command()(verb)


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
    from tools.shards.index import require_one
    from tools.shards.repair import repair_folder
    from tools.shards.verify import verify as read

    require_one(folders, elsewhere)
    reports = []
    for folder in folders:
        deeds = []
        if repair:
            with _progress(f"{folder}: checking") as progress:
                deeds = repair_folder(folder, elsewhere, workers=workers, progress=progress)
        for deed in () if as_json else deeds:  # now: what follows may end with a message
            say(f"{'repaired' if deed.done else 'left  '}  {deed.file}: {deed.what}")
        with _progress(str(folder)) as progress:
            report = read(folder, elsewhere, images=images, workers=workers, progress=progress)
        report.repairs = [deed._asdict() for deed in deeds]
        reports.append(report)
        if not as_json:
            _say_report(report)
    if as_json:
        _print([report.as_dict() for report in reports])
    if not all(report.whole for report in reports):
        raise typer.Exit(1)


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
    """Say what is in shards: samples, images, captions, duplicates, what cannot be read."""
    from jobs.cli.stats_table import table
    from tools.shards.index import require_one
    from tools.shards.stats import stats as read

    require_one(folders, elsewhere)
    if picture is not None:
        from tools.shards.stats_plot import require_drawable

        require_drawable(picture)
    figures = []
    for folder in folders:
        with _progress(str(folder)) as progress:
            figures.append(
                read(
                    folder,
                    elsewhere,
                    captions_choice=captions,
                    images=images,
                    workers=workers,
                    progress=progress,
                )
            )
        if not as_json:
            table(figures[-1])
    if picture is not None:
        from tools.shards.stats_plot import draw

        draw(figures, picture)
        if not as_json:
            say(f"drawn: {picture}")
    if as_json:
        _print([one.as_dict() for one in figures])


def reshard(
    folders: Folders,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to make.")],
    samples: Annotated[
        Path | None, typer.Option("--samples", metavar="FILE", help="Take the keys of this file, one a line.")
    ] = None,
    has_caption: Annotated[bool, typer.Option("--has-caption", help="Take samples with a caption.")] = False,
    classes: Annotated[
        list[int] | None, typer.Option("--class", metavar="NUMBER", help="Take this class; repeatable.")
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option("--kinds", metavar="KIND", help="Take images of this kind by content, as JPEG,PNG."),
    ] = None,
    min_side: Annotated[
        int | None, typer.Option("--min-side", metavar="PIXELS", help="Take images with no shorter side.")
    ] = None,
    max_aspect: Annotated[
        float | None,
        typer.Option("--max-aspect", metavar="RATIO", help="Take images whose sides have no larger ratio."),
    ] = None,
    dedupe: Annotated[bool, typer.Option("--dedupe", help="Of the same image bytes take the first.")] = False,
    fraction: Annotated[
        float | None,
        typer.Option("--fraction", metavar="F", help="Take this share, drawn by key and --seed."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of --fraction.")] = 0,
    first: Annotated[
        int | None, typer.Option("--first", metavar="N", help="Take the first N of what is left.")
    ] = None,
    drop_bad: Annotated[
        bool, typer.Option("--drop-bad", help="Leave out images that cannot be decoded, and list them.")
    ] = False,
    prefix: Annotated[
        bool, typer.Option("--prefix", help="Put the folder's name before each key, FOLDER/KEY.")
    ] = False,
    samples_per_shard: Annotated[
        int | None, typer.Option("--samples-per-shard", metavar="N", min=1, help="Default: 10,000.")
    ] = None,
    bytes_per_shard: Annotated[
        str | None, typer.Option("--bytes-per-shard", metavar="SIZE", help="Such as '1 GB', by the images.")
    ] = None,
    shuffle: Annotated[
        int | None, typer.Option("--shuffle", metavar="SEED", help="Write in a shuffled order.")
    ] = None,
    workers: Workers = 1,
    as_json: AsJson = False,
) -> None:
    """Write samples of shards into others: a subset, a filter, several folders, another size of shard.

    Conditions are applied in the order of this list. A sample goes over byte for byte, with all its
    members; the same command goes on where it was stopped.
    """
    from jobs.cli.convert import run_conversion
    from tools.convert.readers.shards import Options, index_as_before

    options = Options(
        samples=samples,
        has_caption=has_caption,
        classes=tuple(classes or ()),
        kinds=tuple(kinds or ()),
        min_side=min_side,
        max_aspect=max_aspect,
        dedupe=dedupe,
        fraction=fraction,
        seed=seed,
        first=first,
        drop_bad=drop_bad,
        prefix=prefix,
    )
    run_conversion(
        "shards",
        folders,
        options,
        out=out,
        samples_per_shard=samples_per_shard,
        bytes_per_shard=bytes_per_shard,
        shuffle=shuffle,
        workers=workers,
        as_json=as_json,
        after=lambda: index_as_before(folders, out),
    )


def _print(documents: list[dict[str, Any]]) -> None:
    """One folder's document as it is, those of several as a list."""
    print_document(documents[0] if len(documents) == 1 else documents)


def _say_report(report: Any) -> None:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in report.kinds.items())
    say(
        f"{report.folder}: {report.samples:,} samples ({kinds or 'no image'}) with {report.captions:,} "
        f"captions in {report.shards} shards, "
        + ("whole" if report.whole else f"{len(report.broken)} broken shards, {len(report.bad)} bad samples")
    )
    faults = [*report.broken, *report.bad]
    for fault in faults[:_SHOWN]:
        where = fault["shard"] if fault["key"] is None else f"{fault['shard']} {fault['key']}"
        say(f"  {where}: {fault['reason']}")
    if len(faults) > _SHOWN:
        say(f"  … and {len(faults) - _SHOWN} more; --json names all")
    for note in report.notes:
        say(f"  note: {note}")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's stderr, gone at the end; elsewhere nothing: an answer a folder follows."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
