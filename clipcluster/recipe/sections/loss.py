"""The section `loss`: what is minimised over the global batch. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from clipcluster.recipe.sections.base import KeyProblem, Section, key
from clipcluster.recipe.sections.values import Float, Int


class Loss(Section):
    """What is minimised over the global batch."""

    name: Literal["clip", "siglip"] = key(
        "result",
        "The contrastive loss: clip (cross-entropy over all samples of the batch, both ways) or siglip "
        "(a sigmoid for every pair, with model.logit_bias).",
        "clip",
    )
    label_smoothing: Float = key(
        "result",
        "Fraction of each target that is spread evenly over all candidates. Not with siglip.",
        0.0,
        ge=0,
        lt=1,
    )
    chunk: Int | None = key(
        "speed",
        "Rows of a rank's logits that are in memory at a time. Default: all.",
        None,
        ge=1,
    )

    @model_validator(mode="after")
    def _smoothed(self) -> Loss:
        if self.name == "siglip" and self.label_smoothing:
            raise KeyProblem("label_smoothing", "not defined for loss.name siglip; remove it, or set clip")
        return self
