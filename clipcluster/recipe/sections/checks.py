"""The section `checks`: findings of the check that are intended. No torch."""

from __future__ import annotations

from typing import Literal

from clipcluster.recipe.sections.base import Section, key

CheckName = Literal[
    "few-steps",
    "learning-rate",
    "long-captions",
    "long-warmup",
    "slow-beta2",
    "text-from-scratch",
    "weak-augmentation",
]


class Checks(Section):
    """Findings of the check that are intended."""

    allow: tuple[CheckName, ...] = key(
        "record",
        "Names of checks whose findings are intended: these are then part of the summary and no warnings.",
        (),
    )
