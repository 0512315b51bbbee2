"""The CLIP model: an image tower and a text tower, projected into one embedding space."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipcluster.errors import UserError
from clipcluster.model.clip_text import ClipTextTower
from clipcluster.model.losses import widen
from clipcluster.model.towers import ImageTower, TextTower, build_image_tower, build_text_tower
from clipcluster.model.weights import Coverage, load_weights_of

if TYPE_CHECKING:
    from clipcluster.data.tokenizer import Tokenizer
    from clipcluster.recipe.sections.recipe import Recipe


class Clip(nn.Module):
    """An image tower and a text tower, a linear projection of each, and scale and bias of the logits.

    embed_dim: width of the common space. scale: the factor of the logits at the start; max_scale: its bound,
    if any. bias: what is added to the logits at the start; None for a model without a bias.
    projection_bias: the towers (`image`, `text`) whose projection has one; CLIP's have none, but its ResNets'
    image. projections: of images and of text, each `linear`, `mlp` (of OpenCLIP's forms) or `none`, as
    SigLIP's image towers end in the common space.
    `starting_weights` says what was loaded, one entry a file.
    """

    def __init__(
        self,
        image: ImageTower,
        text: TextTower | ClipTextTower,
        *,
        embed_dim: int,
        scale: float,
        max_scale: float | None,
        bias: float | None = None,
        projection_bias: Collection[str] = (),
        projections: tuple[str, str] = ("linear", "linear"),
    ) -> None:
        super().__init__()
        self.image = image
        self.text = text
        of_image, of_text = projections
        widths, last = (image.width, 2 * embed_dim, embed_dim), "image" in projection_bias
        self.image_projection = _projection(of_image, widths, (True, last))
        widths = (text.width, (text.width + embed_dim) // 2, embed_dim)
        self.text_projection = _projection(of_text, widths, (False, "text" in projection_bias))
        self.logit_scale = nn.Parameter(torch.tensor([math.log(scale)]))  # (1,): FSDP2 shards no scalar
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor([bias]))
        self.embed_dim = embed_dim
        self.max_scale = max_scale
        self.starting_weights: tuple[Coverage, ...] = ()
        self.register_load_state_dict_pre_hook(_read_scalars)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float, normalised pixels -> (B, E) L2-normalised, float32 or wider."""
        return functional.normalize(widen(self.image_projection(self.image(images))), dim=-1)

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, L) int64 tokens, (B, L) bool mask of real tokens -> (B, E) L2-normalised, float32 or wider."""
        return functional.normalize(widen(self.text_projection(self.text(tokens, mask))), dim=-1)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp the logit scale to its bound, after every step (Radford et al. 2021, section 2.5)."""
        if self.max_scale is not None:
            self.logit_scale.clamp_(max=math.log(self.max_scale))


def build_clip(
    recipe: Recipe, tokenizer: Tokenizer | None, assets: Path | None = None, starting_weights: bool = True
) -> Clip:
    """The model of a recipe's `model` section, in float32 on the CPU.

    Random weights are drawn from torch's default generator: seed it first. With `starting_weights=False` no
    weight file is read: for a model that is about to load a checkpoint.
    `assets` is the run's folder of tokenizers and configurations fetched at submission.

    Raises UserError for an unknown tower, a setting it does not take, or weights that do not match.
    """
    config = recipe.model
    image_section, text_section = config.image, config.text
    assert image_section is not None
    assert text_section is not None
    assert tokenizer is not None
    image, image_coverage = build_image_tower(
        image_section,
        image_size=recipe.data.image.size,
        assets=assets,
        weights_from=config.weights_from,
        starting_weights=starting_weights,
    )
    text, text_coverage = build_text_tower(
        text_section,
        tokenizer=tokenizer,
        assets=assets,
        weights_from=config.weights_from,
        starting_weights=starting_weights,
        longer=bool(config.weights),
    )
    projections = config.projections
    for name, kind, tower in (("image", projections.image, image), ("text", projections.text, text)):
        if kind == "none" and tower.width != config.embed_dim:
            raise UserError(
                f"model.projections.{name}: none, but the {name} tower's vectors have {tower.width} "
                f"dimensions and model.embed_dim is {config.embed_dim}; make them equal, or project."
            )
    clip = Clip(
        image,
        text,
        embed_dim=config.embed_dim,
        scale=config.logit_scale.init,
        max_scale=config.logit_scale.max,
        bias=config.logit_bias.init if config.logit_bias else None,
        projection_bias=config.projection_bias,
        projections=(projections.image, projections.text),
    )
    clip.starting_weights = tuple(coverage for coverage in (image_coverage, text_coverage) if coverage)
    if config.weights and starting_weights:
        clip.starting_weights = (load_weights_of(config, clip),)
    return clip


def _read_scalars(clip: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Weights of other programs, and checkpoints of format 1, have 0-dimensional scale and bias."""
    for name in (f"{prefix}logit_scale", f"{prefix}logit_bias"):
        if name in state and state[name].ndim == 0:
            state[name] = state[name].reshape(1)


def _projection(kind: str, widths: tuple[int, int, int], biases: tuple[bool, bool]) -> nn.Module:
    """From a tower's width to the embedding's; an mlp over the width between them."""
    width, hidden, embed_dim = widths
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return _linear(width, embed_dim, biases[1])
    layers = {
        "fc1": _linear(width, hidden, biases[0]),
        "act": nn.GELU(),
        "fc2": _linear(hidden, embed_dim, biases[1]),
    }
    return nn.Sequential(OrderedDict(layers))


def _linear(width: int, out: int, bias: bool) -> nn.Linear:
    linear = nn.Linear(width, out, bias=bias)
    nn.init.normal_(linear.weight, std=width**-0.5)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
