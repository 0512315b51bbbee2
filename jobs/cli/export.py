"""The verb export: a model in another program's form."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.cli.options import AnyModel, Runs, Weights, say


def export(
    what: AnyModel,
    kind: Annotated[
        Literal["open_clip", "hf", "safetensors", "onnx"],
        typer.Option(
            "--format",
            help="open_clip: a model of OpenCLIP; hf: a dual encoder of transformers; safetensors: each "
            "tower for timm or transformers; onnx: both towers as graphs.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="The folder to write; an older export there is replaced."),
    ],
    weights: Weights = None,
    runs: Runs = None,
) -> None:
    """Write a model in another program's form, with its preprocessing and a model card."""
    from clipcluster.export.export import export as write
    from clipcluster.runtime.environment import share_cores

    share_cores()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of transformers
    opened = write(what, kind, out, weights=weights, runs=runs)
    of = opened.name if opened.step is None else f"{opened.name}, step {opened.step:,}"
    say(f"{out}: {of}{', averaged weights' if opened.averaged else ''}, as {kind}")
