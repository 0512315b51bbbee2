"""What was written gives the model's own features: asked of every export before it takes its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clipcluster.build.opened import Opened
from clipcluster.errors import UserError

TOLERANCE = 1e-5
"""Largest difference of a feature of a vector of length one; of logits, beside the largest of them."""
BATCHES = (1, 3)
CAPTIONS = (
    "a photo of a cat",
    "Two dogs, and 3 birds!",
    "a drawing of a very long street with " + "many " * 200 + "houses",
)


def images_of(opened: Opened, count: int) -> Tensor:
    """Normalised pixels at random, (count, 3, S, S); the same at every call."""
    size = opened.recipe.data.image.size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def captions_of(opened: Opened, count: int) -> tuple[Tensor, Tensor]:
    """Tokens (count, L) int64 and mask (count, L) bool of the first captions."""
    assert opened.tokenizer is not None
    return opened.tokenizer(CAPTIONS[:count])


def is_dual_encoder(opened: Opened) -> bool:
    """Whether the model has a text tower; else it is a classifier."""
    return hasattr(opened.model, "encode_text")


def unit(vectors: Tensor) -> Tensor:
    """(B, E) -> (B, E) of length one."""
    return nn.functional.normalize(vectors, dim=-1)


@torch.no_grad()
def compare(
    opened: Opened,
    what: str,
    image: Callable[[Tensor], Any] | None = None,
    text: Callable[[Tensor, Tensor], Any] | None = None,
) -> None:
    """Compare features with the model's, in batches of two sizes.

    image: (B, 3, S, S) normalised pixels -> features of images, or a classifier's logits. text: tokens and
    mask -> features of captions. Arrays or tensors, (B, E).

    Raises UserError where they differ by more than `TOLERANCE`, and where the model's own are not finite.
    """
    model = opened.model
    for count in BATCHES:
        if image is not None:
            pixels = images_of(opened, count)
            own = model.encode_image(pixels) if is_dual_encoder(opened) else model.classify(pixels)
            _check(what, "images", torch.as_tensor(image(pixels)), own)
        if text is not None:
            tokens, mask = captions_of(opened, count)
            _check(what, "captions", torch.as_tensor(text(tokens, mask)), model.encode_text(tokens, mask))


def _check(what: str, kind: str, found: Tensor, own: Tensor) -> None:
    if not own.isfinite().all():
        raise UserError(
            f"The model's own features of {kind} are not finite: its training diverged. Export an earlier "
            "checkpoint."
        )
    if found.shape != own.shape:
        shapes = f"{tuple(found.shape)}, and the model's are {tuple(own.shape)}"
        raise UserError(f"{what} gives features of {kind} of shape {shapes}. Choose another --format.")
    largest = float((found - own).abs().max()) / max(1.0, float(own.abs().max()))
    if not largest <= TOLERANCE:
        raise UserError(
            f"{what} does not compute what the model does: its features of {kind} differ by {largest:.2g}, "
            f"and at most {TOLERANCE:g} is allowed. Choose another --format."
        )
