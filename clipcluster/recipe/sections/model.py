"""The section `model`: the towers and what joins them. No torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from clipcluster.recipe.sections.base import Section, key, section
from clipcluster.recipe.sections.values import Float, Int


class ImageTower(Section):
    """The image tower."""

    timm: str = key("result", "Name of the tower in timm, such as convnextv2_tiny or vit_base_patch16_224.")
    weights: str | None = key(
        "result",
        "File with the tower's starting weights. Default: from scratch.",
        None,
        path="path",
        min_length=1,
    )
    args: dict[str, Any] = key("result", "Arguments for timm's create_model, such as drop_path_rate.", {})


class TextTower(Section):
    """The text tower: exactly one of `hf` and `arch`."""

    hf: str | None = key(
        "result",
        "Folder with a transformers model's configuration, or its name on the hub.",
        None,
        path="name",
        min_length=1,
    )
    arch: str | None = key(
        "result",
        "Model type known to transformers (gpt2, roberta, …), built from scratch with `config`.",
        None,
    )
    config: dict[str, Any] = key("result", "With `arch`: values of its configuration, such as n_layer.", {})
    weights: str | None = key(
        "result",
        "File with the tower's starting weights, or 'pretrained' for those that belong to `hf`. "
        "Default: from scratch.",
        None,
        path="path",
        min_length=1,
    )
    pool: Literal["last", "first", "mean"] | None = key(
        "result",
        "Which token stands for the caption: the last real one, the first, or the mean of the real ones. "
        "Default: by architecture (last for causal ones, first for the others).",
        None,
    )

    @model_validator(mode="after")
    def _one_origin(self) -> TextTower:
        if (self.hf is None) == (self.arch is None):
            raise ValueError(
                "should have exactly one of hf (a folder or a hub name) and arch (a model type, from scratch)"
            )
        if self.config and self.arch is None:
            raise ValueError("config goes with arch; a tower named by hf brings its own configuration")
        if self.weights == "pretrained" and self.hf is None:
            raise ValueError("weights: pretrained goes with hf; with arch give a file, or leave it out")
        return self


class LogitScale(Section):
    """The learned scale of the similarities."""

    init: Float = key("result", "Its value at the start (1/0.07 as in CLIP).", 1 / 0.07, gt=0)
    max: Float = key("result", "Its upper bound.", 100.0, gt=0)

    @model_validator(mode="after")
    def _below_the_bound(self) -> LogitScale:
        if self.init > self.max:
            raise ValueError(f"init {self.init:g} is above max {self.max:g}")
        return self


class Model(Section):
    """The towers and what joins them."""

    image: ImageTower = section("The image tower.")
    text: TextTower = section("The text tower.")
    embed_dim: Int = key("result", "Length of the vectors in which images and captions meet.", 512, ge=1)
    logit_scale: LogitScale = section("The learned scale of the similarities.", LogitScale)
