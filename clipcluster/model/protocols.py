"""The interfaces of models that tasks and evaluations use; any module with these members has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor


class Model(Protocol):
    """The members of every `torch.nn.Module` that are used."""

    training: bool

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def modules(self) -> Iterator[Any]: ...


class ImageEncoder(Model, Protocol):
    """A model that maps images into a space of `embed_dim` dimensions."""

    embed_dim: int

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float, normalised pixels -> (B, E) L2-normalised, float32 or wider."""


class DualEncoder(ImageEncoder, Protocol):
    """A model that maps images and texts into one space.

    logit_scale: (1,), the logarithm of the factor of the similarities. logit_bias: (1,), what is added to the
    scaled similarities, or None.
    """

    @property
    def logit_scale(self) -> Tensor: ...

    @property
    def logit_bias(self) -> Tensor | None: ...

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, L) int64 tokens, (B, L) bool mask of real tokens -> (B, E) L2-normalised, float32 or wider."""

    def clamp_logit_scale(self) -> None:
        """Clamp the logit scale to its upper bound."""


class Classifier(ImageEncoder, Protocol):
    """A model with logits for a fixed list of classes; its space is that of the tower's features."""

    def classify(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float, normalised pixels -> logits (B, classes), float32 or wider."""
