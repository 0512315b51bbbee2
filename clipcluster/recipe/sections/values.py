"""The values that several sections share: numbers as YAML writes them, pairs, colours, paths. No torch."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

MEANS = {
    "openai": (0.48145466, 0.4578275, 0.40821073),
    "imagenet": (0.485, 0.456, 0.406),
}
DEVIATIONS = {
    "openai": (0.26862954, 0.26130258, 0.27577711),
    "imagenet": (0.229, 0.224, 0.225),
}


def _whole(value: object) -> object:
    """A whole number also where it was written as a decimal or in quotes (``1e6``, ``"1_000"``)."""
    if isinstance(value, bool):
        raise ValueError("should be a whole number")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError("should be a whole number") from None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _real(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


def _list_of(count: int, value: object) -> object:
    """Exactly so many entries, else one message about the list instead of one about each place."""
    if not isinstance(value, (list, tuple)) or len(value) != count:
        raise ValueError(f"should be a list of {count} numbers")
    return value


Int = Annotated[int, BeforeValidator(_whole)]
Float = Annotated[float, BeforeValidator(_real), Field(allow_inf_nan=False)]
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
    if isinstance(value, str) and value:
        return value
    if (
        isinstance(value, (list, tuple))
        and value
        and all(isinstance(entry, str) and entry for entry in value)
    ):
        return tuple(value)
    raise ValueError("should be a path or a list of paths")


Paths = Annotated[
    str | tuple[str, ...],
    BeforeValidator(_one_or_more),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
    ),
]
