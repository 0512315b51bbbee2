"""Activations computed again in the backward pass instead of kept (Chen et al. 2016, section 4.1)."""

from __future__ import annotations

from torch import nn

from clipcluster.errors import UserError
from clipcluster.model.clip_text import ClipTextTower
from clipcluster.model.towers import ImageTower, TextTower


def checkpoint_activations(model: nn.Module) -> None:
    """Switch activation checkpointing on in every tower of a model; dropout is the same in both passes.

    Raises UserError for a tower without it, by name.
    """
    kinds = (ImageTower, TextTower, ClipTextTower)
    towers: list[tuple[str, nn.Module]]
    towers = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    for name, tower in towers or [("model", model)]:
        if not _switch_on(tower):
            raise UserError(
                f"train.activation_checkpointing: the tower {name} does not support it; set it to false, and "
                "lower train.micro_batch to save memory"
            )


def _switch_on(module: nn.Module) -> bool:
    """Switch it on in the module, or in all below it that support it; whether any did."""
    if hasattr(module, "set_grad_checkpointing"):  # timm's towers, and CLIP's text transformer
        try:
            module.set_grad_checkpointing(True)  # type: ignore[operator]
        except AssertionError:  # what timm's towers without it raise
            return False
        return True
    if hasattr(module, "supports_gradient_checkpointing"):  # a transformers model
        if module.supports_gradient_checkpointing:
            # the second is its name in older versions of transformers
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            switch = next(getattr(module, name) for name in names if hasattr(module, name))
            switch({"use_reentrant": False})
        return bool(module.supports_gradient_checkpointing)
    return sum(_switch_on(child) for child in module.children()) > 0
