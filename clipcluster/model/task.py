"""A task turns a batch into a loss; it is the only part of a step that depends on what is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

import torch
from torch import Tensor, nn

from clipcluster.data.loading.batch import normalise
from clipcluster.model.losses import contrastive, siglip
from clipcluster.recipe.sections.loss import Loss

if TYPE_CHECKING:
    from clipcluster.data.loading.batch import Batch
    from clipcluster.model.protocols import DualEncoder
    from clipcluster.recipe.sections.recipe import Recipe
    from clipcluster.runtime.world import World

Features = Mapping[str, Tensor]
"""The input of a task's loss, by name: tensors with one row per sample.

Floating-point tensors may carry gradients back to the towers; others (targets, a teacher's features) do not.
"""
T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """A rank's loss, to be differentiated, and metrics to log, all () on the device.

    Those of the whole batch are the mean over the ranks.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Task(nn.Module, ABC):
    """Base of all tasks. DDP or FSDP2 wraps it, so all of its methods run through `forward`.

    frozen: name -> file or folder of weights that the task uses and never trains; a checkpoint has their
    hashes.
    after_features: called where this rank has computed its features, before it needs those of others.

    A wrapper reduces gradients for its own `forward` only: those of a method that is called on the wrapped
    module directly are not reduced, without an error. Callers therefore write `wrapped(Task.report, batch)`,
    never `wrapped.module.report(batch)`.
    """

    frozen: Mapping[str, Path] = {}
    after_features: Callable[[], None] = staticmethod(lambda: None)

    def forward(self, call: Callable[..., T], *args: Any) -> T:
        """`call(self, *args)`."""
        return call(self, *args)

    @abstractmethod
    def encode(self, batch: Batch) -> Features:
        """The features of b samples: a rank's part of the batch, or a micro-batch; it is on the device."""

    def targets(self, batch: Batch) -> Features:
        """What else the loss needs of the batch (a teacher's features); it has no gradient.

        Where features are computed twice, to save memory, this is computed once.
        """
        return {}

    @final
    def features(self, batch: Batch) -> Features:
        """The whole input of the loss."""
        found = {**self.encode(batch), **self.targets(batch)}
        self.after_features()
        return found

    @abstractmethod
    def loss(self, features: Features) -> Report:
        """This rank's part of the loss over the features of all ranks; the mean over ranks is the batch's.

        It may use parameters of the model directly (the logit scale), without declaring them.
        """

    @final
    def report(self, batch: Batch) -> Report:
        """The loss of a batch in one pass."""
        return self.loss(self.features(batch))

    def after_step(self) -> None:
        """Called after every optimizer step."""


class ContrastiveTask(Task):
    """The contrastive loss of images and captions over the batch of all ranks.

    mean, std: of the pixels in 0..1, one value per channel. choice: the recipe's `loss`; siglip needs a model
    with a bias.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: DualEncoder,
        mean: Sequence[float],
        std: Sequence[float],
        ranks: World,
        choice: Loss | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.choice = choice or Loss()
        self.ranks = ranks
        self.register_buffer("mean", torch.tensor(tuple(mean)), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)), persistent=False)

    def encode(self, batch: Batch) -> Features:
        """`image` and `text`, (b, E) float32 or wider, L2-normalised."""
        assert batch.tokens is not None, "the contrastive task needs captions"
        assert batch.mask is not None
        images = normalise(batch.images, self.mean, self.std)
        image = self.model.encode_image(images)
        return {"image": image, "text": self.model.encode_text(batch.tokens, batch.mask)}

    def loss(self, features: Features) -> Report:
        image, text, choice = features["image"], features["text"], self.choice
        scale, bias = self.model.logit_scale.exp().squeeze(), self.model.logit_bias
        metrics = {"logit_scale": scale.detach()}
        if choice.name == "siglip":
            assert bias is not None, "siglip needs a model with a bias"
            loss, accuracy = siglip(image, text, scale, bias.squeeze(), self.ranks, chunk=choice.chunk)
            metrics["logit_bias"] = bias.detach().squeeze()
        else:
            smoothing, chunk = choice.label_smoothing, choice.chunk
            loss, accuracy = contrastive(
                image, text, scale, self.ranks, label_smoothing=smoothing, chunk=chunk
            )
        return Report(loss, {"loss": loss.detach(), **metrics, "batch_accuracy": accuracy})

    def after_step(self) -> None:
        self.model.clamp_logit_scale()


def build_contrastive(
    recipe: Recipe, model: DualEncoder, ranks: World, assets: Path | None = None
) -> ContrastiveTask:
    """`task: contrastive`. A model's logit bias, which only the loss siglip uses, is frozen for others."""
    if recipe.loss.name != "siglip" and model.logit_bias is not None:
        model.logit_bias.requires_grad_(False)
    return ContrastiveTask(model, recipe.data.image.mean, recipe.data.image.std, ranks, recipe.loss)
