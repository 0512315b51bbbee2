"""The section `data.image`: how an image becomes the input of its tower. No torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema, field_validator

from clipcluster.recipe.sections.base import Section, key, section
from clipcluster.recipe.sections.values import DEVIATIONS, MEANS, Deviation, Float, Int, Mean, Pair

_RAND_AUGMENT = re.compile(
    r"rand(-(m\d+|n[1-9]\d*|p(0|1|0?\.\d+|1\.0*)|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3aw?)))*"
)


def _strengths(value: object) -> object:
    """One number for brightness, contrast and saturation, or three, or four with the hue: four."""
    strengths = [value] * 3 if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    if not isinstance(strengths, (list, tuple)) or len(strengths) not in (3, 4):
        raise ValueError("should be a number, or a list of 3 or 4 (brightness, contrast, saturation, hue)")
    return (*strengths, 0.0)[:4]


def _small_hue(value: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    if min(value) < 0 or value[3] > 0.5:
        raise ValueError("should be numbers of at least 0, the fourth (hue) at most 0.5")
    return value


Jitter = Annotated[
    tuple[Float, Float, Float, Float],
    BeforeValidator(_strengths),
    AfterValidator(_small_hue),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0},
                {"type": "array", "items": {"type": "number", "minimum": 0}, "minItems": 3, "maxItems": 4},
            ]
        }
    ),
]


class RandomErasing(Section):
    """Random erasing: rectangles of training images that are erased."""

    probability: Float = key("result", "Probability of erasing, for each image.", 0.25, gt=0, le=1)
    mode: Literal["pixel", "rand", "const"] = key(
        "result",
        "What the rectangles become: pixel (random pixels), rand (one random colour each) or const (the mean "
        "colour).",
        "pixel",
    )
    count: Int = key(
        "result", "Upper bound of the rectangles of an image; they share the erased area.", 1, ge=1
    )


class EvaluationImage(Section):
    """How evaluation resizes and crops an image."""

    resize: Literal["shortest", "squash"] = key(
        "record",
        "shortest: the shorter side is resized and the centre square taken; squash: both sides are resized, "
        "whatever the shape.",
        "shortest",
    )
    crop_pct: Float = key(
        "record",
        "Fraction of the resized side that the centre square keeps: it is resized to size / crop_pct, "
        "rounded down (0.875: to 256 for a size of 224).",
        1.0,
        gt=0,
        le=1,
    )


class Image(Section):
    """How an image becomes the input of its tower."""

    size: Int = key("result", "Side of the square input, in pixels.", 224, ge=1)
    crop_scale: Pair = key(
        "result",
        "Area of the random training crop, as fractions of the image: smallest, largest.",
        (0.9, 1.0),
    )
    crop_ratio: Pair = key(
        "result",
        "Aspect ratio (width / height) of the random training crop: smallest, largest.",
        (0.75, 4 / 3),
    )
    flip: bool = key("result", "Flip training images horizontally with probability 0.5.", False)
    augment: str | None = key(
        "result",
        "RandAugment of training images in timm's notation, such as rand-m9-mstd0.5-inc1. Default: none.",
        None,
    )
    color_jitter: Jitter | None = key(
        "result",
        "Strength of random changes of training images' brightness, contrast and saturation: one number for "
        "the three, or a list of them, with the hue's (at most 0.5) as a fourth. It is applied beside "
        "`augment` too. Default: none.",
        None,
    )
    random_erasing: RandomErasing | None = section(
        "Random erasing: rectangles of training images that are erased.", None
    )
    evaluation: EvaluationImage = section("How evaluation resizes and crops an image.", {})
    interpolation: Literal["bicubic", "bilinear", "random"] = key(
        "result",
        "Interpolation of the resizing, always with antialiasing; random: bilinear or bicubic for each "
        "training image, bicubic in evaluation.",
        "bicubic",
    )
    mean: Mean = key(
        "result",
        "Mean of each channel, subtracted: openai, imagenet or three numbers (red, green, blue).",
        MEANS["openai"],
    )
    std: Deviation = key(
        "result",
        "Standard deviation of each channel, divided by: openai, imagenet or three numbers.",
        DEVIATIONS["openai"],
    )

    @field_validator("augment")
    @classmethod
    def _notation(cls, value: str | None) -> str | None:
        if value is not None and not _RAND_AUGMENT.fullmatch(value):
            raise ValueError(
                "should be rand and its settings, such as rand-m9-mstd0.5-inc1: m magnitude, n changes, "
                "p probability of each, mstd, mmax, inc 0 or 1, t weights, 3a or 3aw"
            )
        return value

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("should be two numbers above zero, the smaller first")
        return value

    @field_validator("crop_scale")
    @classmethod
    def _fractions(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] > 1:
            raise ValueError("should be fractions of the image, at most 1.0")
        return value

    @field_validator("std")
    @classmethod
    def _above_zero(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) <= 0:
            raise ValueError("should be above zero")
        return value
