"""The section `distill`: what is learned from teachers, and how much it counts. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from clipcluster.recipe.sections.base import Section, key, section
from clipcluster.recipe.sections.values import Float, Int


class Stored(Section):
    """Teachers' embeddings stored in the shards, with the augmentations that they belong to (DataCompDR)."""

    captions: Literal["both", "drawn"] = key(
        "result",
        "both: each image is trained with its own caption and with one of its synthetic captions, and the "
        "two losses are added, as published; drawn: with the one caption that captions_in draws.",
        "both",
    )
    widths: tuple[Annotated[Int, Field(ge=1)], ...] = key(
        "result",
        "Width of each teacher's part of an embedding, in their order there.",
        (768, 768),
        min_length=1,
    )
    scale: Float = key("result", "Factor of the teachers' similarities (1 / temperature).", 100.0, gt=0)


class Distill(Section):
    """Learning from teachers, beside or instead of the contrastive loss."""

    weight: Float = key(
        "result",
        "Weight of the distillation loss: the teachers' distributions over the batch against the student's. "
        "Published: 1.0 for DataCompDR-12M, 0.75 for ViT-B/16 on DataCompDR-1B.",
        1.0,
        ge=0,
    )
    contrastive: Float | None = key(
        "result",
        "Weight of the student's own contrastive loss. Default: 1 - weight, and at least 0.",
        None,
        ge=0,
    )
    stored: Stored | None = section("Teachers' embeddings stored in the shards.", None)

    @property
    def contrastive_weight(self) -> float:
        """The weight of the contrastive loss in force."""
        return max(0.0, 1.0 - self.weight) if self.contrastive is None else self.contrastive
