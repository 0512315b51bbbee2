"""Durations, times, memory and node counts of a recipe: ``26 epochs``, ``15 min``, ``200 GB``, ``2-4``.

Each class reads its own text (`parse`), prints it back in one canonical form (`str`), and tells pydantic and
JSON Schema about itself. No torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from pydantic import (
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, core_schema

_NUMBER = r"[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?"
_QUANTITY = re.compile(rf"\s*(?P<count>{_NUMBER})\s*(?P<unit>[A-Za-z]+)\s*")
_DURATION_UNITS = {"step": "steps", "steps": "steps", "sample": "samples", "samples": "samples"} | {
    "epoch": "epochs",
    "epochs": "epochs",
}
_TIME_UNITS = (
    dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1)
    | dict.fromkeys(("min", "mins", "minute", "minutes"), 60)
    | dict.fromkeys(("h", "hour", "hours"), 3600)
    | dict.fromkeys(("d", "day", "days"), 86400)
)
_MEMORY_UNITS = {"m": 1, "mb": 1, "mib": 1, "g": 1024, "gb": 1024, "gib": 1024} | dict.fromkeys(
    ("t", "tb", "tib"), 1024 * 1024
)
_DURATION_HELP = "a duration is 'N steps', 'N samples' or 'N epochs'"
_TIME_HELP = "a time is 'N s', 'N min', 'N h' or 'N d'"


def _quantity(text: object, help_: str) -> tuple[Fraction, str]:
    """Split ``"1.5 h"`` into (3/2, "h"); ValueError with `help_` for anything else."""
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(help_)
    return Fraction(match["count"].replace("_", "")), match["unit"].lower()


def _decimal(value: Fraction) -> str:
    """The shortest decimal of a fraction that came from decimal text."""
    return str(value.numerator) if value.denominator == 1 else repr(float(value))


def _round_half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


class _Text:
    """What the units share: they are read from text and written as text."""

    @classmethod
    def parse(cls, value: object) -> Any:
        raise NotImplementedError

    @classmethod
    def _pattern(cls) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.to_string_ser_schema(when_used="always")
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return cls._pattern()


@dataclass(frozen=True)
class Duration(_Text):
    """A length of training: a count of optimizer steps, of samples, or of epochs (which may be a decimal)."""

    count: Fraction
    unit: str  # steps | samples | epochs

    @classmethod
    def parse(cls, value: object) -> Duration:
        """Read ``"2200 steps"``, ``"1e6 samples"``, ``"0.5 epochs"``; ValueError says what is allowed."""
        if isinstance(value, Duration):
            return value
        count, unit = _quantity(value, _DURATION_HELP)
        if unit not in _DURATION_UNITS:
            raise ValueError(_DURATION_HELP)
        unit = _DURATION_UNITS[unit]
        if unit != "epochs" and count.denominator != 1:
            raise ValueError(f"{unit} come whole; only epochs may be a decimal")
        return cls(count, unit)

    def steps(self, steps_per_epoch: int, batch_size: int) -> int:
        """This duration in optimizer steps, rounded to the nearest (a half goes up)."""
        if self.unit == "steps":
            return int(self.count)
        if self.unit == "samples":
            return _round_half_up(self.count / batch_size)
        return _round_half_up(self.count * steps_per_epoch)

    def period(self, steps_per_epoch: int, batch_size: int) -> int:
        """The same for something that comes every so often: at least 1 step."""
        return max(1, self.steps(steps_per_epoch, batch_size))

    def __str__(self) -> str:
        return f"{_decimal(self.count)} {self.unit}"

    @classmethod
    def _pattern(cls) -> dict[str, Any]:
        return {"type": "string", "pattern": rf"^\s*{_NUMBER}\s*(steps?|samples?|epochs?)\s*$"}


@dataclass(frozen=True)
class Time(_Text):
    """A length of wall-clock time."""

    seconds: float

    @classmethod
    def parse(cls, value: object) -> Time:
        """Read ``"90 s"``, ``"15 min"``, ``"4 h"``, ``"2 d"``; ValueError says what is allowed."""
        if isinstance(value, Time):
            return value
        count, unit = _quantity(value, _TIME_HELP)
        if unit not in _TIME_UNITS:
            raise ValueError(_TIME_HELP)
        if count <= 0:
            raise ValueError("a time is longer than zero")
        return cls(float(count * _TIME_UNITS[unit]))

    @property
    def minutes(self) -> int:
        """Whole minutes, rounded up: the unit of SLURM's time limits."""
        return math.ceil(self.seconds / 60)

    def __str__(self) -> str:
        for name, size in (("d", 86400), ("h", 3600), ("min", 60)):
            if self.seconds % size == 0:
                return f"{int(self.seconds // size)} {name}"
        return f"{_decimal(Fraction(repr(self.seconds)))} s"

    @classmethod
    def _pattern(cls) -> dict[str, Any]:
        return {"type": "string", "pattern": rf"^\s*{_NUMBER}\s*({'|'.join(_TIME_UNITS)})\s*$"}


def parse_period(value: object) -> Duration | Time:
    """Read a duration or a time; ValueError says what is allowed."""
    if isinstance(value, (Duration, Time)):
        return value
    _, unit = _quantity(value, f"{_DURATION_HELP}, {_TIME_HELP}")
    if unit in _DURATION_UNITS:
        return Duration.parse(value)
    if unit in _TIME_UNITS:
        return Time.parse(value)
    raise ValueError(f"{_DURATION_HELP}, {_TIME_HELP}")


Period = Annotated[
    Duration | Time,
    PlainValidator(parse_period),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"anyOf": [Duration._pattern(), Time._pattern()]}),
]


@dataclass(frozen=True)
class Memory(_Text):
    """Memory of a node, in the units of SLURM: 1 GB is 1024 MB."""

    megabytes: int

    @classmethod
    def parse(cls, value: object) -> Memory:
        """Read ``"200 GB"``, ``"500 MB"``, ``"1.5 TB"``; ValueError says what is allowed."""
        if isinstance(value, Memory):
            return value
        count, unit = _quantity(value, "memory is 'N MB', 'N GB' or 'N TB'")
        if unit not in _MEMORY_UNITS:
            raise ValueError("memory is 'N MB', 'N GB' or 'N TB'")
        megabytes = math.ceil(count * _MEMORY_UNITS[unit])
        if megabytes < 1:
            raise ValueError("memory is more than zero")
        return cls(megabytes)

    def __str__(self) -> str:
        return f"{self.megabytes // 1024} GB" if self.megabytes % 1024 == 0 else f"{self.megabytes} MB"

    @classmethod
    def _pattern(cls) -> dict[str, Any]:
        return {"type": "string", "pattern": rf"^\s*{_NUMBER}\s*[MGTmgt](i?[Bb])?\s*$"}


@dataclass(frozen=True)
class Nodes(_Text):
    """The nodes a run asks for: a count (`least` equals `most`), or a range of which SLURM grants some."""

    least: int
    most: int

    @classmethod
    def parse(cls, value: object) -> Nodes:
        """Read ``2`` or ``"2-4"``; ValueError says what is allowed."""
        if isinstance(value, Nodes):
            return value
        match = (
            None
            if isinstance(value, bool)
            else re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6}))?\s*", str(value))
        )
        if match is None:
            raise ValueError("nodes are a count (2) or a range (2-4)")
        least, most = int(match[1]), int(match[2] or match[1])
        if least < 1 or most < least:
            raise ValueError("nodes start at 1, and a range goes from the fewer to the more (2-4)")
        return cls(least, most)

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"

    @classmethod
    def _pattern(cls) -> dict[str, Any]:
        return {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^\s*\d+(\s*-\s*\d+)?\s*$"},
            ]
        }
