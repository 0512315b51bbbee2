"""The section `optim`: the optimizer and its schedule. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from clipcluster.recipe.sections.base import Section, key
from clipcluster.recipe.sections.values import Float, Pair
from clipcluster.recipe.units import Duration


class Optim(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw"] = key("result", "The optimizer.", "adamw")
    lr: Float = key("result", "Learning rate after the warm-up.", ge=0)
    weight_decay: Float = key(
        "result", "Decoupled weight decay, not applied to norms, biases and the logit scale.", 0.2, ge=0
    )
    betas: Pair = key("result", "Decay rates of the two moments.", (0.9, 0.98))
    eps: Float = key("result", "Added to the square root of the second moment.", 1e-6, gt=0)
    clip_norm: Float | None = key(
        "result",
        "Largest norm of the whole gradient; larger ones are scaled down. Default: no clipping.",
        None,
        gt=0,
    )
    schedule: Literal["cosine", "constant"] = key(
        "result", "After the warm-up: cosine (to zero at the end of the run) or constant.", "cosine"
    )
    warmup: Duration = key(
        "result",
        "Length of the linear rise of the learning rate from nearly zero.",
        "0 steps",
    )

    @field_validator("betas")
    @classmethod
    def _decays(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("should be two numbers from 0 to below 1")
        return value
