"""What one step computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clipcluster.data.loading.batch import normalise
from clipcluster.model.clip import Clip
from clipcluster.model.losses import Ranks, contrastive

if TYPE_CHECKING:
    from clipcluster.data.loading.batch import Batch


@dataclass(frozen=True)
class Report:
    """The loss to differentiate and what to log, on the device: a rank's own, the batch's is their mean."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class ContrastiveTask(nn.Module):
    """Images and captions of one batch into the contrastive loss over all ranks.

    DDP wraps this module: every parameter, the scale of the logits included, is used in its forward.
    mean, std: of the pixels in 0..1, one a channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Clip, mean: Sequence[float], std: Sequence[float], ranks: Ranks) -> None:
        super().__init__()
        self.model = model
        self.ranks = ranks
        self.register_buffer("mean", torch.tensor(tuple(mean)), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)), persistent=False)

    def forward(self, batch: Batch) -> Report:
        """batch: a rank's share, on the module's device. The loss is over the shares of all ranks."""
        images = normalise(batch.images, self.mean, self.std)
        image, text, scale = self.model(images, batch.tokens, batch.mask)
        loss, accuracy = contrastive(image, text, scale, self.ranks)
        report = {"loss": loss.detach(), "logit_scale": scale.detach(), "batch_accuracy": accuracy}
        return Report(loss, report)

    def after_step(self) -> None:
        """What follows every optimizer step."""
        self.model.clamp_logit_scale()
