"""Random masking of image patches in training (FLIP, Li et al. 2023), for networks of transformers.

timm's networks have it themselves (`patch_drop_rate`).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import PatchDropout
from torch import Tensor, nn

from clipcluster.errors import UserError

# Their embeddings are (B, prefix + patches, width), positions added; no later layer depends on positions.
MASKABLE = {
    *("clip_vision_model", "chinese_clip_vision_model", "siglip_vision_model"),
    *("vit", "deit", "vit_msn", "ijepa", "dinov2", "dinov2_with_registers"),
}


class _DropPatches:
    """A forward hook that drops a random part of the tokens after the first `prefix`, in training only.

    It is an object and asks its module for the mode, so that a deep copy of the network has its own hook.
    """

    def __init__(self, ratio: float, prefix: int) -> None:
        self.drop = PatchDropout(ratio, num_prefix_tokens=prefix)

    def __call__(self, embeddings: nn.Module, arguments: Any, tokens: Tensor) -> Tensor:
        kept: Tensor = self.drop.train(embeddings.training)(tokens)
        return kept


def mask_patches(network: nn.Module, settings: Any, ratio: float) -> None:
    """Drop `ratio` of the patch tokens of a network in training; its class token stays.

    Raises UserError for a network without patch tokens.
    """
    if settings.model_type not in MASKABLE:
        raise UserError(
            f"model.image.mask_ratio: {settings.model_type} has no patch tokens that could be left out; set "
            f"it to 0, or name one of {', '.join(sorted(MASKABLE))}."
        )
    inside: Any = getattr(network, "vision_model", network)  # as transformers 4 builds CLIP's and SigLIP's
    patches = (settings.image_size // settings.patch_size) ** 2
    with torch.no_grad():
        tokens = inside.embeddings(torch.zeros(1, 3, settings.image_size, settings.image_size)).shape[1]
    inside.embeddings.register_forward_hook(_DropPatches(ratio, tokens - patches))
