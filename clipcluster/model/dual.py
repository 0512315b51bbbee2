"""Whole dual encoders of transformers, by folder or hub name, as a `Clip` of their towers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipcluster.data.tokenizer import Tokenizer
from clipcluster.errors import UserError
from clipcluster.model.clip import Clip, build_clip
from clipcluster.model.hugging_face import config_of, pretrained, quiet_transformers, refusing
from clipcluster.model.towers import HfImageTower, TextTower, check_fits
from clipcluster.model.weights import load_weights

if TYPE_CHECKING:
    from clipcluster.recipe.sections.recipe import Recipe

_POOLS = {
    "clip": "pooler",
    "chinese_clip": "first",
    "siglip": "pooler",
    "vision-text-dual-encoder": "pooler",
}
"""The pooling of each kind's text tower, by model type."""
_EMBED_DIM = 512  # the recipe's default


class SiglipText(TextTower):
    """SigLIP's text tower: it attends to padding, and a caption's features are those of the last position."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.transformer(input_ids=tokens).pooler_output


def build_dual_encoder(
    recipe: Recipe, tokenizer: Tokenizer, assets: Path | None = None, starting_weights: bool = True
) -> Clip:
    """The dual encoder of a recipe, whole or from two towers. Raises as `build_dual` and `build_clip`."""
    build = build_dual if recipe.model.dual is not None else build_clip
    return build(recipe, tokenizer, assets, starting_weights)


def build_dual(
    recipe: Recipe, tokenizer: Tokenizer, assets: Path | None = None, starting_weights: bool = True
) -> Clip:
    """The dual encoder of `model.dual`, in float32 on the CPU; its features equal those of transformers.

    Random weights are drawn from torch's default generator. `starting_weights` and `assets`: as in
    `clipcluster.model.clip.build_clip`.

    Raises UserError for a model that is no known dual encoder, for a tokenizer or context that does not fit,
    and for weights that do not match.
    """
    config = recipe.model
    dual = config.dual
    assert dual is not None
    settings, folder = config_of("model.dual", dual.hf, assets)
    _check_kind(settings)
    settings.vision_config.image_size = recipe.data.image.size
    check_fits(settings.text_config, tokenizer)
    siglip = settings.model_type == "siglip"
    if siglip:
        _check_padding(settings.text_config, tokenizer)
    if settings.text_config.model_type == "clip_text_model":
        _check_end(settings.text_config, tokenizer)
    network = _network(settings)
    image = HfImageTower(network.vision_model, settings.vision_config.hidden_size, "pooler")
    kind = SiglipText if siglip else TextTower
    text = kind(network.text_model, settings.text_config.hidden_size, _POOLS[settings.model_type])
    embed_dim = image.width if siglip else settings.projection_dim
    if config.embed_dim not in (embed_dim, _EMBED_DIM):
        raise UserError(
            f"model.embed_dim: {config.embed_dim}, but the embedding of {dual.hf} has {embed_dim} "
            "dimensions; leave it out."
        )
    clip = Clip(
        image,
        text,
        embed_dim=embed_dim,
        scale=config.logit_scale.init,
        max_scale=config.logit_scale.max,
        bias=config.logit_bias.init if config.logit_bias else None,
        projections=("none", "none") if siglip else ("linear", "linear"),
    )
    named = dual.weights if dual.weights is not None else config.weights
    if named and starting_weights:
        source = pretrained("model.dual", dual.hf, folder) if named == "pretrained" else Path(named)
        whole = load_weights(
            clip, source, name="model", missing=config.missing, weights_from=config.weights_from
        )
        clip.starting_weights = (whole,)
    return clip


def _check_kind(settings: Any) -> None:
    if settings.model_type not in _POOLS:
        hint = " (of SigLIP 2 the models of a fixed resolution)" if settings.model_type == "siglip2" else ""
        raise UserError(
            f"model.dual.hf: {settings.model_type} is none of the dual encoders known here: "
            f"{', '.join(_POOLS)}{hint}. Name its towers in model.image and model.text instead."
        )


def _check_padding(text: Any, tokenizer: Tokenizer) -> None:
    """UserError unless captions are padded to all of SigLIP's positions: it pools at the last one."""
    if tokenizer.context_length != text.max_position_embeddings:
        raise UserError(
            f"data.text.context_length: {tokenizer.context_length}, but SigLIP pools at the last of its "
            f"{text.max_position_embeddings} positions, to which captions are padded: set it to "
            f"{text.max_position_embeddings}."
        )


def _check_end(text: Any, tokenizer: Tokenizer) -> None:
    """UserError where the tokenizer's end token is not that of CLIP's text tower, which pools there.

    Configurations with eos_token_id 2 are older files, which pool at the largest token. Without an end token
    the tower pools at the token that begins all captions, whose features are the same for each.
    """
    end = tokenizer.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    if tokenizer.eos_id != end:
        raise UserError(
            f"data.text.tokenizer: it ends captions with token {tokenizer.eos_id}, and CLIP's text tower "
            f"pools at token {end}: name the tokenizer that the model was trained with."
        )


def _network(settings: Any) -> Any:
    from transformers import AutoModel

    what = f"model.dual: transformers cannot build {settings.model_type} of these sizes"
    with quiet_transformers(), refusing(what):
        return AutoModel.from_config(settings, dtype=torch.float32)
