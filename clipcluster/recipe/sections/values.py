"""Types of values that several sections share: numbers, pairs, colours, paths. No torch."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticKnownError

MEANS = {
    "openai": (0.48145466, 0.4578275, 0.40821073),
    "imagenet": (0.485, 0.456, 0.406),
}
DEVIATIONS = {
    "openai": (0.26862954, 0.26130258, 0.27577711),
    "imagenet": (0.229, 0.224, 0.225),
}


def _no_bool(error: Literal["int_type", "float_type"], value: object) -> object:
    """Anything but true and false, which Python counts as numbers."""
    if isinstance(value, bool):
        raise PydanticKnownError(error)
    return value


def _list_of(count: int, value: object) -> object:
    """A list of exactly `count` entries; else one error about the list instead of one about each entry."""
    if not isinstance(value, (list, tuple)) or len(value) != count:
        raise ValueError(f"should be a list of {count} numbers")
    return value


Int = Annotated[int, BeforeValidator(partial(_no_bool, "int_type"))]
Float = Annotated[float, BeforeValidator(partial(_no_bool, "float_type")), Field(allow_inf_nan=False)]
Pair = Annotated[tuple[Float, Float], BeforeValidator(partial(_list_of, 2))]


def _replace(names: dict[str, tuple[float, float, float]], value: object) -> object:
    if not isinstance(value, str):
        return _list_of(3, value)
    if value not in names:
        raise ValueError(f"should be one of {', '.join(names)}, or three numbers (red, green, blue)")
    return names[value]


_COLOURS = WithJsonSchema(
    {
        "anyOf": [
            {"enum": list(MEANS)},
            {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3},
        ]
    }
)
Mean = Annotated[tuple[Float, Float, Float], BeforeValidator(partial(_replace, MEANS)), _COLOURS]
Deviation = Annotated[tuple[Float, Float, Float], BeforeValidator(partial(_replace, DEVIATIONS)), _COLOURS]


def _one_or_more(value: object) -> object:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, (list, tuple)) or not paths or not all(p and isinstance(p, str) for p in paths):
        raise ValueError("should be a path or a list of paths")
    return value


Paths = Annotated[
    str | Annotated[tuple[str, ...], Field(min_length=1)],
    BeforeValidator(_one_or_more),
]
