"""The verbs `clipcluster bench …`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from clipcluster.errors import UserError
from clipcluster.text import counted
from jobs.cli.options import AsJson, group, print_document, say

bench = group("Measure speed on this machine.", callback=lambda: None)  # so that one verb makes a group
Peer = Annotated[
    Path | None,
    typer.Option(
        "--peer",
        metavar="PYTHON",
        help="An interpreter with open_clip_torch 3.3.0 and webdataset 0.2.86: measure its loader too.",
    ),
]


@bench.command()
def loader(
    shards: Annotated[
        Path | None,
        typer.Option(
            "--shards", metavar="DIR", help="An indexed folder of shards. Default: synthetic photographs."
        ),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option("--index", metavar="FOLDER", help="Where its index is, if elsewhere."),
    ] = None,
    workers: Annotated[
        str, typer.Option("--workers", metavar="N[,N]", help="Numbers of loader processes to measure.")
    ] = "1",
    size: Annotated[
        int, typer.Option("--size", metavar="PIXELS", min=8, help="Side of the cropped images.")
    ] = 224,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Samples of a batch.")] = 64,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=0.1, max=3600, help="Seconds of each repetition.")
    ] = 3.0,
    repetitions: Annotated[
        int, typer.Option("--repetitions", metavar="N", min=1, help="How often each contender is measured.")
    ] = 5,
    peer: Peer = None,
    normalise: Annotated[
        bool, typer.Option("--normalise", help="Normalise on the CPU too; training does it on the device.")
    ] = False,
    augmented: Annotated[
        bool,
        typer.Option(
            "--augmented", help="Measure it with RandAugment, flip and random erasing too, beside timm's."
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write the JSON to this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the loader's images per second, beside decoding alone and OpenCLIP's and timm's loaders."""
    from contextlib import nullcontext

    from tools.bench.loader import Settings, measure, synthetic_photographs

    counts = _worker_counts(workers)
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}")
    with synthetic_photographs() if shards is None else nullcontext(shards) as folder:
        settings = Settings(
            folder, index, counts, size, batch_size, seconds, repetitions, peer, normalise, augmented
        )
        document = measure(settings, (lambda text: None) if as_json else say)
    if out is not None:
        out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_document(document)
        return
    for result in document["results"]:
        _say_result(result)


def _worker_counts(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise UserError(f"--workers {text}: give one or more numbers from 1, such as 1,2")
    return tuple(map(int, numbers))


def _say_result(result: dict[str, Any]) -> None:
    alone, peer, augmented = result["alone"], result.get("peer"), result.get("augmented")
    contenders = {
        "loader": result,
        "decoding alone": alone["decode"],
        "decoding and resizing alone": alone["decode_resize"],
        **({"loader, augmented": augmented} if augmented else {}),
        **({f"timm {augmented['timm']['timm']}, augmented": augmented["timm"]} if augmented else {}),
        **({f"OpenCLIP {peer['open_clip']}": peer} if peer else {}),
    }
    say(f"{counted(result['workers'], 'worker')}:")
    for name, figure in contenders.items():
        line = f"  {name:28} {figure['images_per_second']:7.0f} images/s"
        line += f" ({figure['least']:.0f} to {figure['largest']:.0f})"
        if figure["images_per_core_second"]:
            line += f", {figure['images_per_core_second']:.0f} per core second"
        if figure["worker_uss_bytes"]:
            line += f", {figure['worker_uss_bytes'] / 1e6:.0f} MB per worker"
        say(line)
    say(f"  beside decoding and resizing alone: {_compared(result['share_of_decode_resize'])}")
    if augmented:
        say(f"  augmented, beside timm's loader: {_compared(augmented['timm']['times_faster'])}")
    if peer:
        say(f"  beside OpenCLIP's loader: {_compared(peer['times_faster'])}")


def _compared(ratio: dict[str, Any]) -> str:
    text = f"{ratio['median']:.2f} times ({ratio['least']:.2f} to {ratio['largest']:.2f})"
    return text + (f", {ratio['by_core']:.2f} by processor time" if ratio["by_core"] else "")
