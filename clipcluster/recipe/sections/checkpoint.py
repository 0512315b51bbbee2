"""The section `checkpoint`: when to save, and what to keep. No torch."""

from __future__ import annotations

from pydantic import field_validator

from clipcluster.recipe.sections.base import Section, key, section
from clipcluster.recipe.sections.values import Int
from clipcluster.recipe.units import Interval, Period


class Best(Section):
    """Checkpoints kept for their value of a metric."""

    metric: str = key("record", "The metric, such as val/t2i_r1.", min_length=1)
    count: Int = key("record", "How many to keep.", 1, ge=1)


class Keep(Section):
    """Which checkpoints are kept; the others are deleted once a newer one is complete."""

    last: Int = key(
        "record", "How many of the newest to keep; at least 2, since the newest may be damaged.", 3
    )
    every: Interval | None = key("record", "Also keep one at each such interval, permanently.", None)
    best: Best | None = section("Also keep the best by a metric.", None)

    @field_validator("last")
    @classmethod
    def _two_at_least(cls, value: int) -> int:
        if value < 2:
            raise ValueError("should be at least 2: the newest may be damaged, or still be being written")
        return value


class Checkpoint(Section):
    """When to save, and what to keep."""

    every: Period = key(
        "record",
        "How often to save: a duration, a time, or auto: by the measured cost of a save and how often the "
        "run was interrupted.",
        "15 min",
    )
    keep: Keep = section("Which checkpoints are kept.", {})
