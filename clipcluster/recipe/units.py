"""Durations, times, memory and node counts of a recipe: ``26 epochs``, ``15 min``, ``200 GB``, ``2-4``.

Each class reads its own text (`parse`), prints it back in one canonical form (`str`), and tells pydantic and
JSON Schema about itself. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import (
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, core_schema
from typing_extensions import Self

_NUMBER = r"[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?"
_QUANTITY = re.compile(rf"\s*(?P<count>{_NUMBER})\s*(?P<unit>[A-Za-z]+|%)?\s*")

T = TypeVar("T")


def _quantity(
    value: object, units: Mapping[str, T], help_: str, guesses: str, *, zero: bool = False
) -> tuple[Fraction, T]:
    """Split ``"1.5 h"`` into 3/2 and the value of ``h`` in `units`.

    Raises ValueError with `help_` for anything else; for a number alone it suggests the units in `guesses`,
    unless no unit makes it right: below zero, and zero itself without `zero`.
    """
    bare = isinstance(value, (int, float)) and not isinstance(value, bool)
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if bare or (match is not None and match["unit"] is None):
        text = str(value).strip()
        number = float(text.replace("_", ""))
        if not (number > 0 or (zero and number == 0)):
            raise ValueError(f"{help_}, {'not negative' if zero else 'more than zero'}")
        asked = [f"{text} {unit}" for unit in guesses.split()]
        if "steps" in units and not number.is_integer():  # there is no part of a step
            part = [f"{100 * number:g}%"] if "%" in units and number < 1 else []
            asked = [*part, f"{text} epochs", *asked[1:]]
        raise ValueError(f"{help_}; did you mean {' or '.join(asked)}?")
    if match is None or match["unit"].lower() not in units:
        count, begun = match.groups() if match else ("", "?")
        near = [f"; did you mean {count} {unit}?" for unit in guesses.split() if unit.startswith(begun)]
        raise ValueError(help_ + "".join(near))
    return Fraction(match["count"].replace("_", "")), units[match["unit"].lower()]


def _decimal(value: Fraction) -> str:
    """The shortest decimal of a fraction that came from decimal text."""
    return str(value.numerator) if value.denominator == 1 else repr(float(value))


def _text_like(unit: str) -> dict[str, Any]:
    """The JSON Schema of a number with a unit that matches the pattern."""
    return {"type": "string", "pattern": rf"^\s*{_NUMBER}\s*{unit}\s*$"}


class _Text:
    """Base of the units, which are read from text and written as text; `SCHEMA` is the JSON Schema of it."""

    SCHEMA: ClassVar[dict[str, Any]]

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read a recipe's value; ValueError with what is allowed."""
        raise NotImplementedError

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            lambda value: value if isinstance(value, cls) else cls.parse(value),
            serialization=core_schema.to_string_ser_schema(when_used="always"),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return dict(cls.SCHEMA)


@dataclass(frozen=True)
class Duration(_Text):
    """A length of training: optimizer steps, samples, epochs, or a percentage of the run's steps."""

    count: Fraction
    unit: str  # steps | samples | epochs | %

    UNITS: ClassVar[dict[str, str]] = {
        **{f"{unit}{plural}": f"{unit}s" for unit in ("step", "sample", "epoch") for plural in ("", "s")},
        "%": "%",
    }
    HELP = "a duration is 'N steps', 'N samples', 'N epochs' or 'N%' of the run"
    ZERO: ClassVar[bool] = True
    """Whether it may be zero."""
    SCHEMA = _text_like(r"(steps?|samples?|epochs?|%)")

    @classmethod
    def parse(cls, value: object) -> Self:
        """``"2200 steps"``, ``"1e6 samples"``, ``"0.5 epochs"``, ``"5%"``."""
        count, unit = _quantity(value, cls.UNITS, cls.HELP, "steps", zero=cls.ZERO)
        if not (count or cls.ZERO):
            raise ValueError("should be more than zero, such as 100 steps")
        if unit in ("steps", "samples") and count.denominator != 1:
            raise ValueError(f"should be a whole number of {unit}; only epochs and % may be a decimal")
        if unit == "%" and count > 100:
            raise ValueError("should be at most 100% (of the run's steps)")
        return cls(count, unit)

    def steps(self, steps_per_epoch: int, batch_size: int, total_steps: int) -> int:
        """In optimizer steps of a run of `total_steps`, rounded to the nearest, a half up."""
        steps_of_one = {
            "steps": Fraction(1),
            "samples": Fraction(1, batch_size),
            "epochs": Fraction(steps_per_epoch),
            "%": Fraction(total_steps, 100),
        }
        return math.floor(self.count * steps_of_one[self.unit] + Fraction(1, 2))

    def __str__(self) -> str:
        return f"{_decimal(self.count)}{'' if self.unit == '%' else ' '}{self.unit}"

    @property
    def shown(self) -> str:
        """For messages, `1 epoch`; `str` gives the form in stored recipes and in the hash of a run's name."""
        return str(self).removesuffix("s" * (self.count == 1))


class Interval(Duration):
    """The duration between two events of a run, such as two checkpoints."""

    ZERO = False


class Length(Duration):
    """The duration of a whole run, which cannot be a percentage."""

    UNITS: ClassVar[dict[str, str]] = {name: unit for name, unit in Duration.UNITS.items() if unit != "%"}
    HELP = "the length of a run is 'N steps', 'N samples' or 'N epochs'"
    ZERO = False
    SCHEMA = _text_like(r"(steps?|samples?|epochs?)")


@dataclass(frozen=True)
class Time(_Text):
    """A length of wall-clock time."""

    seconds: float

    UNITS = (
        dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1)
        | dict.fromkeys(("min", "mins", "minute", "minutes"), 60)
        | dict.fromkeys(("h", "hour", "hours"), 3600)
        | dict.fromkeys(("d", "day", "days"), 86400)
    )
    HELP = "a time is 'N s', 'N min', 'N h' or 'N d'"
    SCHEMA = _text_like(rf"({'|'.join(UNITS)})")

    @classmethod
    def parse(cls, value: object) -> Self:
        """``"90 s"``, ``"15 min"``, ``"4 h"``, ``"2 d"``."""
        if slurm := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", str(value)):
            days, hours, minutes, seconds = (int(part or 0) for part in slurm.groups())
            meant = cls(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
            raise ValueError(f"{cls.HELP}; did you mean {meant}?")
        count, unit = _quantity(value, cls.UNITS, cls.HELP, "min h")
        if count <= 0:
            raise ValueError("a time should be longer than zero")
        return cls(float(count * unit))

    @property
    def minutes(self) -> int:
        """Whole minutes, rounded up: the unit of SLURM's time limits."""
        return math.ceil(self.seconds / 60)

    def __str__(self) -> str:
        for name, size in (("d", 86400), ("h", 3600), ("min", 60)):
            if self.seconds % size == 0:
                return f"{int(self.seconds // size)} {name}"
        return f"{_decimal(Fraction(repr(self.seconds)))} s"


AUTO: Final = "auto"
"""A period that the run chooses itself, by what it measures."""


def parse_period(value: object) -> Interval | Time | Literal["auto"]:
    """Read a duration, a time or `auto`; ValueError with what is allowed."""
    if isinstance(value, (Interval, Time)):
        return value
    if isinstance(value, str) and value.strip() == AUTO:
        return AUTO
    kinds: dict[str, type[Interval] | type[Time]] = {
        **dict.fromkeys(Interval.UNITS, Interval),
        **dict.fromkeys(Time.UNITS, Time),
    }
    help_ = f"{Duration.HELP}, {Time.HELP}, and 'auto' leaves it to the run"
    return _quantity(value, kinds, help_, "steps min")[1].parse(value)


Period = Annotated[
    Interval | Time | Literal["auto"],
    PlainValidator(parse_period),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"anyOf": [Duration.SCHEMA, Time.SCHEMA, {"const": AUTO}]}),
]


@dataclass(frozen=True)
class Memory(_Text):
    """Memory of a node, in the units of SLURM: 1 GB is 1024 MB."""

    megabytes: int

    SCHEMA = _text_like(r"[MGTmgt](i?[Bb])?")

    @classmethod
    def parse(cls, value: object) -> Self:
        """``"200 GB"``, ``"500 MB"``, ``"1.5 TB"``."""
        sizes = {"m": 1, "g": 1024, "t": 1024 * 1024}
        units = {f"{letter}{rest}": size for letter, size in sizes.items() for rest in ("", "b", "ib")}
        count, unit = _quantity(value, units, "memory is 'N MB', 'N GB' or 'N TB'", "MB GB")
        megabytes = math.ceil(count * unit)
        if megabytes < 1:
            raise ValueError("memory should be more than zero")
        return cls(megabytes)

    def __str__(self) -> str:
        return f"{self.megabytes // 1024} GB" if self.megabytes % 1024 == 0 else f"{self.megabytes} MB"


@dataclass(frozen=True)
class Nodes(_Text):
    """The nodes a run asks for: a count (`least` equals `most`), or a range of which SLURM grants some."""

    least: int
    most: int

    SCHEMA: ClassVar[dict[str, Any]] = {
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "string", "pattern": r"^\s*\d+(\s*-\s*\d+)?\s*$"},
        ]
    }

    @classmethod
    def parse(cls, value: object) -> Self:
        """``2`` or ``"2-4"``."""
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6}))?\s*", str(value))
        if match is None:
            raise ValueError("nodes are a count (2) or a range (2-4)")
        least, most = int(match[1]), int(match[2] or match[1])
        if least < 1 or most < least:
            raise ValueError("nodes start at 1, and a range has the smaller count first (2-4)")
        return cls(least, most)

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"
