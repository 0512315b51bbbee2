"""The section `checks`: what the check warns of and a recipe means nevertheless. No torch."""

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
    """What the check warns of and the recipe means nevertheless."""

    allow: tuple[CheckName, ...] = key(
        "record", "Checks by name whose finding is intended: it is then reported and is no warning.", ()
    )
