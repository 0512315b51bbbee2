"""The section `checkpoint`: when to save, and what to keep. No torch."""

from __future__ import annotations

from pydantic import field_validator

from clipcluster.recipe.sections.base import Section, key, section
from clipcluster.recipe.sections.values import Int
from clipcluster.recipe.units import Duration, Period, Time


class Best(Section):
    """Checkpoints kept because they measured best."""

    metric: str = key("record", "The metric, such as val/t2i_r1.", min_length=1)
    count: Int = key("record", "How many to keep.", 1, ge=1)


class Keep(Section):
    """Which checkpoints stay; the others go once a newer one is in place."""

    last: Int = key("record", "The newest so many; at least 2, since the newest may be found broken.", 3)
    every: Duration | None = key("record", "Also one every so often, for good.", None)
    best: Best | None = section("Also the best by a metric.", None)

    @field_validator("last")
    @classmethod
    def _two_at_least(cls, value: int) -> int:
        if value < 2:
            raise ValueError("keep at least 2: the newest may be found broken, or still be being written")
        return value


class Checkpoint(Section):
    """When to save, and what to keep."""

    every: Period = key("record", "How often to save: a duration or a time.", Time.parse("15 min"))
    keep: Keep = section("Which checkpoints stay.", Keep)
