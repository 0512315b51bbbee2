"""The verb `export`: a trained model in another program's form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from clipcluster.runs.names import runs_folder
from jobs.cli.options import Runs, say


def export(
    what: Annotated[
        str,
        typer.Argument(metavar="RUN|CHECKPOINT|FOLDER", help="A run, a checkpoint's folder, or a model's."),
    ],
    kind: Annotated[
        Literal["hf", "safetensors", "onnx"],
        typer.Option(
            "--format",
            help="hf: a dual encoder of transformers; safetensors: each tower for timm or transformers; "
            "onnx: both towers as graphs.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The folder; an older export is replaced.")
    ],
    weights: Annotated[
        Literal["ema", "raw"] | None,
        typer.Option(
            "--weights", help="The moving average or the weights themselves. Default: the average, if any."
        ),
    ] = None,
    runs: Runs = None,
) -> None:
    """Write a model in another program's form, with its preprocessing and a model card."""
    from clipcluster.export.export import export as write
    from clipcluster.runtime.environment import share_cores

    share_cores()
    opened = write(what, kind, out, weights=weights, runs=runs_folder(runs))
    of = opened.name if opened.step is None else f"{opened.name}, step {opened.step:,}"
    say(f"{out}: {of}{', averaged weights' if opened.averaged else ''}, as {kind}")
