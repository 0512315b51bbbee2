"""The section `distill`: the teachers of a distillation, and the weights of its losses. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from clipcluster.recipe.sections.base import KeyProblem, Kinds, Section, key, section
from clipcluster.recipe.sections.model import Model
from clipcluster.recipe.sections.values import Deviation, Float, Int, Mean


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
    scale: Float = key("result", "Logit scale of the teachers (1 / temperature).", 100.0, gt=0)


def _scale() -> Any:
    return key("result", "Logit scale of the teacher (1 / temperature). Default: its own.", None, gt=0)


class RunTeacher(Section):
    """A teacher that was trained here."""

    run: str = key(
        "result",
        "Folder of the teacher's run (its newest checkpoint is taken), or of one of its checkpoints. The "
        "moving average is taken where there is one.",
        path="path",
        min_length=1,
    )
    scale: Float | None = _scale()


class TeacherImage(Section):
    """The images that a teacher takes."""

    size: Int | None = key(
        "result", "Side of the square input, in pixels. Default: the student's.", None, ge=1
    )
    mean: Mean | None = key(
        "result", "Mean of each channel, as data.image.mean. Default: the student's.", None
    )
    std: Deviation | None = key(
        "result", "Standard deviation of each channel, as data.image.std. Default: the student's.", None
    )


class TeacherText(Section):
    """The captions that a teacher takes."""

    tokenizer: str | None = key(
        "result",
        "Tokenizer, as data.text.tokenizer. Default: the student's.",
        None,
        path="name",
        min_length=1,
    )
    context_length: Int | None = key(
        "result", "Number of tokens, as data.text.context_length. Default: the student's.", None, ge=2
    )
    clean: Literal["none", "whitespace", "lower", "canonicalize"] | None = key(
        "result", "What is done to captions first, as data.text.clean. Default: the student's.", None
    )


class ModelTeacher(Section):
    """A teacher by its model, as the section `model` of a recipe has it."""

    model: Model = section("The teacher's towers and weights; all of its weights are needed.")
    image: TeacherImage = section("How the teacher takes images, where it differs.", {})
    text: TeacherText = section("How the teacher takes captions, where it differs.", {})
    scale: Float | None = _scale()


Teacher = Annotated[RunTeacher | ModelTeacher, Kinds(run=RunTeacher, model=ModelTeacher)]


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
    feature_mse: Float = key(
        "result",
        "Weight of the mean squared error between the student's features and the teachers', of images and "
        "captions (CLIP-KD, where it is 2000).",
        0.0,
        ge=0,
    )
    feature_cosine: Float = key(
        "result",
        "Weight of 1 - cosine between the student's image features and the teachers' (Chinese-CLIP, where it "
        "is 0.5).",
        0.0,
        ge=0,
    )
    stored: Stored | None = section("Teachers' embeddings stored in the shards; instead of teachers.", None)
    teachers: tuple[Teacher, ...] = section("Frozen teachers that process each batch; instead of stored.", ())

    @model_validator(mode="after")
    def _one_kind(self) -> Distill:
        if (self.stored is None) == (not self.teachers):
            both = "not both" if self.teachers else "and has neither"
            raise ValueError(f"needs stored: {{}}, or teachers, such as [{{run: FOLDER}}], {both}")
        if not any((self.weight, self.feature_mse, self.feature_cosine)):
            raise KeyProblem(
                "weight",
                "feature_mse and feature_cosine are 0 too, so that nothing is learned from teachers; set one "
                "of the three above 0",
            )
        return self

    @property
    def contrastive_weight(self) -> float:
        """The weight of the contrastive loss, with its default resolved."""
        return max(0.0, 1.0 - self.weight) if self.contrastive is None else self.contrastive
