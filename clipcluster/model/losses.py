"""Losses over the whole batch of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from clipcluster.runtime.world import World


class _Gather(torch.autograd.Function):
    """Concatenate every rank's rows; backward sums the ranks' gradients and keeps the own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: World) -> Tensor:
        ctx.ranks, ctx.count = ranks, len(rows)
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(ranks.size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = ctx.ranks.rank * ctx.count
        return gradient[start : start + ctx.count], None


def gather(rows: Tensor, ranks: World) -> Tensor:
    """The rows of all ranks in the order of ranks, (B, E) -> (size x B, E), with gradients to every rank.

    Every rank must bring equally many rows.
    """
    return rows if ranks.size == 1 else _Gather.apply(rows, ranks)


def contrastive(
    image_features: Tensor, text_features: Tensor, scale: Tensor, ranks: World
) -> tuple[Tensor, Tensor]:
    """The symmetric contrastive loss of CLIP (Radford et al. 2021, figure 3) over the batch of all ranks.

    Each rank takes the mean over its own B rows against the features of all ranks, so that the mean of the
    ranks' losses is the loss of the whole batch, and the mean of the ranks' gradients, which is what DDP
    computes, is the gradient of the whole batch: for the towers because the gathered features carry
    gradients back to their rank, for the scale because every rank's rows count once.

    image_features, text_features: (B, E), L2-normalised. scale: (), the factor itself, not its logarithm.
    Returns the loss, (), float32 or wider, and the fraction of its own images whose own text scores best, ().
    """
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = widen(image_features), widen(text_features)
        embed_dim = image.shape[1]
        everyone = gather(torch.cat([image, text], dim=1), ranks)
        all_images, all_texts = everyone[:, :embed_dim], everyone[:, embed_dim:]
        image_logits = scale * image @ all_texts.T
        text_logits = scale * text @ all_images.T
        targets = torch.arange(len(image), device=image.device) + ranks.rank * len(image)
        image_loss = functional.cross_entropy(image_logits, targets)
        text_loss = functional.cross_entropy(text_logits, targets)
        accuracy = (image_logits.detach().argmax(dim=1) == targets).float().mean()
    return (image_loss + text_loss) / 2, accuracy


def widen(values: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()
