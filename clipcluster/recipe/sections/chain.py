"""What comes before a run and what follows it: the sections `first` and `then` of a recipe. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from clipcluster.recipe.sections.base import Kinds, Section, key, section
from clipcluster.recipe.sections.values import Int


class Convert(Section):
    """Data that is converted before the run starts."""

    convert: str = key("record", "The kind of the input, as of clipcluster shards convert.", min_length=1)
    inputs: tuple[str, ...] = key("record", "The inputs.", (), path="path")
    out: str = key("record", "The folder to make.", path="path", min_length=1)
    options: dict[str, Any] = key("record", "Options of the conversion, by their names with underscores.", {})
    jobs: Int = key("record", "On SLURM, tasks of the array.", 4, ge=1)
    cluster: tuple[str, ...] = key("record", "On SLURM, what they ask for, such as partition=low.", ())


class Before(Section):
    """Another run that finishes before this one starts."""

    recipe: str = key("record", "Its recipe: a file beside this one, or a path.", min_length=1)
    overrides: tuple[str, ...] = key("record", "Keys of it that differ, as key=value.", ())
    gives: tuple[str, ...] = key(
        "record", "Keys of this recipe that are given its folder, such as model.image.weights.", ()
    )


class Export(Section):
    """An export of the finished run."""

    export: Literal["open_clip", "hf", "safetensors", "onnx"] = key("record", "The format.")
    out: str = key("record", "The folder to make.", path="path", min_length=1)
    weights: Literal["ema", "raw"] | None = key(
        "record", "The moving average, or the weights themselves. Default: ema if there.", None
    )


class Measure(Section):
    """An evaluation of the finished run."""

    evaluate: tuple[str, ...] = key("record", "What differs from the run's own evaluations, as key=value.")
    out: str = key("record", "The JSON file to write.", path="path", min_length=1)
    weights: Literal["ema", "raw"] | None = key(
        "record", "The moving average, or the weights themselves. Default: ema if there.", None
    )


class Chain(Section):
    """What comes before a run, and what follows it."""

    first: tuple[Annotated[Convert | Before, Kinds(convert=Convert, recipe=Before)], ...] = section(
        "What must be finished before the run starts.", ()
    )
    then: tuple[Annotated[Export | Measure, Kinds(export=Export, evaluate=Measure)], ...] = section(
        "What follows once the run has finished.", ()
    )
