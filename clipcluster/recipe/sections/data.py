"""The section `data`: what is trained on, and how a sample becomes the towers' input. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from clipcluster.recipe import captions
from clipcluster.recipe.sections.base import Section, key, section
from clipcluster.recipe.sections.values import DEVIATIONS, MEANS, Deviation, Float, Int, Mean, Pair, Paths
from clipcluster.recipe.units import Memory


def _captions_in(value: object) -> object:
    if isinstance(value, dict) and all(isinstance(choice, str) for choice in value):
        for choice, share in value.items():
            if isinstance(share, bool) or not isinstance(share, (int, float)):
                raise ValueError(f"{choice!r} has the probability {share!r}; should be a positive number")
        captions.checked_shares(value)
        return {choice: float(share) for choice, share in value.items()}
    if isinstance(value, str):
        return captions.checked(value)
    raise ValueError(f"should be {captions.CHOICES}, or a mapping of these to probabilities")


CaptionsIn = Annotated[
    str | dict[str, float],
    BeforeValidator(_captions_in),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "object",
                    "additionalProperties": {"type": "number", "exclusiveMinimum": 0},
                    "minProperties": 1,
                },
            ]
        }
    ),
]


def _by_class(value: object) -> object:
    """Class numbers may be written as numbers."""
    if not isinstance(value, dict):
        return value
    return {str(name) if isinstance(name, int) else name: repeat for name, repeat in value.items()}


Repeat = Annotated[Float, Field(ge=0)]
RepeatByClass = Annotated[dict[str, Repeat], BeforeValidator(_by_class)]


class Source(Section):
    """One source of training samples."""

    shards: Paths = key(
        "result",
        "Folder with indexed shards; or a tar, a glob or braces ({00..09}) of either, or a list of these; "
        "here, or at http(s)://, s3://, gs://, hf://, or what commands print (pipe:COMMAND).",
        path="path",
    )
    weight: Float | None = key(
        "result",
        "This source's share of the draws. All sources have one or none has; with none they are one source, "
        "their shards together.",
        None,
        gt=0,
    )
    repeat: Float = key(
        "result",
        "How often an epoch shows each of this source's samples; 0.5: each in every second epoch.",
        1.0,
        ge=0,
    )
    repeat_classes: RepeatByClass = key(
        "result",
        "The same for single classes, in place of `repeat`: {3: 4, cat: 2, dog: 0.5}, by number or by name "
        "in classnames.txt; 0 leaves a class out.",
        {},
    )
    index: str | None = key(
        "record",
        "Folder of the index, where it does not lie beside the shards (clipcluster shards index --index).",
        None,
        path="path",
    )
    captions_in: CaptionsIn | None = key(
        "result",
        "Where the captions are: 'default' (the JSON's captions, else KEY.txt as one caption), 'lines' (the "
        "same, KEY.txt holds one a line), 'txt' (KEY.txt alone), 'json:FIELD' of KEY.json, or "
        "'MEMBER.json:FIELD' of KEY.MEMBER.json. Or several of them, each with its probability: "
        "{default: 0.5, 'syn.json:syn_text': 0.5}. Default: 'lines' where dataset_type.txt says retrieval, "
        "else 'default'.",
        None,
    )


class Image(Section):
    """How an image becomes the tower's input."""

    size: Int = key("result", "Side of the square input, in pixels.", 224, ge=1)
    crop_scale: Pair = key(
        "result", "Area of the random training crop, as shares of the image: smallest, largest.", (0.9, 1.0)
    )
    crop_ratio: Pair = key(
        "result", "Width over height of the random training crop: smallest, largest.", (0.75, 4 / 3)
    )
    flip: bool = key("result", "Mirror every second training image left to right, by chance.", False)
    interpolation: Literal["bicubic", "bilinear"] = key(
        "result", "How images are resized (always with antialiasing).", "bicubic"
    )
    mean: Mean = key(
        "result",
        "Mean of each colour that is subtracted: openai, imagenet or three numbers.",
        MEANS["openai"],
    )
    std: Deviation = key(
        "result",
        "Deviation of each colour that is divided by: openai, imagenet or three numbers.",
        DEVIATIONS["openai"],
    )

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("should be two numbers above zero, the smaller first")
        return value

    @field_validator("crop_scale")
    @classmethod
    def _a_share(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] > 1:
            raise ValueError("should be shares of the image: at most 1.0")
        return value

    @field_validator("std")
    @classmethod
    def _divides(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) <= 0:
            raise ValueError("should be above zero")
        return value


class Text(Section):
    """How a caption becomes the tower's input."""

    tokenizer: str = key(
        "result",
        "'bytes' (one token a byte, no file needed), a folder with a Hugging Face tokenizer, or its name on "
        "the hub.",
        "bytes",
        path="name",
        min_length=1,
    )
    context_length: Int = key("result", "Tokens of a caption; longer ones are cut.", 77, ge=2)
    captions: Literal["all", "random", "first"] = key(
        "result",
        "all: every caption makes a sample of its own (an epoch counts pairs); random: one of an image's "
        "captions at each draw; first: always the first.",
        "random",
    )


class Order(Section):
    """In which order samples come: a pure function of the seed and the step."""

    lanes: Int = key(
        "result",
        "Upper bound of the lanes a pass is cut into (the largest divisor of the batch size up to it is "
        "used). At least ranks x workers keeps reading cheap.",
        64,
        ge=1,
    )
    window: Int = key("result", "Samples of a lane that are shuffled together.", 1024, ge=1)
    full_shuffle_below: Int = key(
        "result", "Sources of at most so many samples are shuffled whole.", 1_000_000, ge=0
    )


class Cache(Section):
    """Where remote shards are kept on a node, shared by its ranks; local ones need none."""

    folder: str | None = key(
        "speed",
        "An absolute path, best on a disk of the node itself; $NAME and ~ are read on the node. Default: "
        "$CLIPCLUSTER_CACHE, else ~/.cache/clipcluster.",
        None,
        shell=True,
        min_length=1,
    )
    size: Memory = key(
        "speed",
        "Upper bound of what is kept; what was used longest ago goes first. Less is kept "
        "where the disk is full.",
        Memory.parse("100 GB"),
    )

    @field_validator("folder")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("/", "$", "~")):
            raise ValueError("should be an absolute path (or begin with $NAME or ~)")
        return value


class BadSamples(Section):
    """Samples that cannot be decoded are replaced and written down; too many stop the run."""

    limit: Float = key(
        "record",
        "Share of the sources' samples (counted as at least 1,000) that may be bad before the run stops.",
        0.01,
        ge=0,
        le=1,
    )


class Data(Section):
    """What is trained on."""

    train: tuple[Source, ...] = section("The sources of training samples.")
    batch_size: Int = key(
        "result", "Global batch: samples of one optimizer step, whatever the cluster's size.", ge=1
    )
    epoch_samples: Int | None = key(
        "result", "Samples of an epoch. Default: the sum of the sources, repeats counted.", None, ge=1
    )
    workers: Int = key("speed", "Loader processes of each rank; 0 loads in the rank itself.", 4, ge=0)
    image: Image = section("How an image becomes the tower's input.", Image)
    text: Text = section("How a caption becomes the tower's input.", Text)
    order: Order = section("In which order samples come.", Order)
    cache: Cache = section("Where remote shards are kept.", Cache)
    bad_samples: BadSamples = section("What happens to samples that cannot be decoded.", BadSamples)

    @field_validator("train")
    @classmethod
    def _sources(cls, value: tuple[Source, ...]) -> tuple[Source, ...]:
        if not value:
            raise ValueError("should name at least one source: [{shards: FOLDER}]")
        weighted = [source.weight is not None for source in value]
        if any(weighted) and not all(weighted):
            raise ValueError(f"source {weighted.index(False)} has no weight: give every source one, or none")
        return value

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Data:
        shared = [number for number, source in enumerate(self.train) if isinstance(source.captions_in, dict)]
        if shared and self.text.captions == "all":
            raise ValueError(
                f"source {shared[0]} draws its captions by probabilities (captions_in), while text.captions: "
                "all shows every caption once a pass: say text.captions: random, or name one choice in "
                "captions_in"
            )
        return self
