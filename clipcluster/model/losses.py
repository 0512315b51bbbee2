"""The contrastive losses of CLIP and SigLIP over the batch of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from clipcluster.runtime.world import World


class _Gather(torch.autograd.Function):
    """Concatenates the rows of all ranks; backward sums the ranks' gradients and keeps this rank's rows."""

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
    """The rows of all ranks in the order of ranks, (B, E) -> (ranks x B, E), with gradients to every rank.

    Collective; B is the same on all ranks.
    """
    return rows if ranks.size == 1 else _Gather.apply(rows, ranks)


def contrastive(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    ranks: World,
    *,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The symmetric contrastive loss of CLIP (Radford et al. 2021, figure 3) over the batch of all ranks.

    Each rank takes the mean over its own B rows against the features of all ranks, so that the mean of the
    ranks' losses is the loss of the whole batch, and the mean of the ranks' gradients, which is what DDP
    computes, is the gradient of the whole batch: for the towers because the gathered features carry
    gradients back to their rank, for the scale because every rank's rows count once.

    image_features, text_features: (B, E), L2-normalised. scale: (), the factor itself, not its logarithm.
    label_smoothing: this fraction of a target is spread evenly over all ranks x B candidates, the correct one
    included (Szegedy et al. 2016, section 7). chunk: rows of logits in memory at a time; default all.
    Returns the loss, (), float32 or wider, and the fraction of its own images whose own text scores best, ().
    """
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = widen(image_features), widen(text_features)
        embed_dim = image.shape[1]
        everyone = gather(torch.cat([image, text], dim=1), ranks)
        all_images, all_texts = everyone[:, :embed_dim], everyone[:, embed_dim:]
        targets = torch.arange(len(image), device=image.device) + ranks.rank * len(image)
        image_loss, accuracy = _cross_entropy(image, all_texts, scale, targets, label_smoothing, chunk)
        text_loss, _ = _cross_entropy(text, all_images, scale, targets, label_smoothing, chunk)
    return (image_loss + text_loss) / 2, accuracy


def _cross_entropy(
    rows: Tensor, columns: Tensor, scale: Tensor, targets: Tensor, smoothing: float, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of the rows' similarities and the fraction of correct rows, () each."""
    if chunk is not None and chunk < len(rows):
        return _CrossEntropies.apply(rows, columns, scale, targets, smoothing, chunk)
    logits = scale * rows @ columns.T
    right = (logits.detach().argmax(dim=1) == targets).float().mean()
    return functional.cross_entropy(logits, targets, label_smoothing=smoothing), right


class _CrossEntropies(torch.autograd.Function):
    """The loss with its gradients, computed for a chunk of rows at a time, so that no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        targets: Tensor,
        smoothing: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        count, candidates = len(rows), len(columns)
        loss, right, by_scale = torch.zeros(3, dtype=rows.dtype, device=rows.device)
        by_rows, by_columns = torch.empty_like(rows), torch.zeros_like(columns)
        for part in torch.arange(count, device=rows.device).split(chunk):
            similarity, wanted = rows[part] @ columns.T, targets[part]
            logits = scale * similarity
            loss += functional.cross_entropy(logits, wanted, reduction="sum", label_smoothing=smoothing)
            right += (logits.argmax(dim=1) == wanted).sum()
            by_logits = logits.softmax(dim=1) - smoothing / candidates
            by_logits[torch.arange(len(part), device=rows.device), wanted] -= 1 - smoothing
            by_scale += (by_logits * similarity).sum()
            by_logits *= scale
            by_rows[part] = by_logits @ columns
            by_columns.addmm_(by_logits.T, rows[part])
        ctx.save_for_backward(*(gradient / count for gradient in (by_rows, by_columns, by_scale)))
        accuracy = right.float() / count
        ctx.mark_non_differentiable(accuracy)
        return loss / count, accuracy

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return (*(gradients[0] * saved for saved in ctx.saved_tensors), None, None, None)


def siglip(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    bias: Tensor,
    ranks: World,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sigmoid loss of SigLIP (Zhai et al. 2023, algorithm 1) over the batch of all ranks.

    Every pair of an image and a text counts by itself: -log sigmoid(z (scale image . text + bias)), z = 1
    where they belong together and -1 elsewhere, summed over all pairs and divided by the number of images.
    Each rank takes its own B images against the texts of all ranks, which are passed around a ring, those of
    one rank at a time (section 3.3): the mean of the ranks' losses and gradients is that of the batch.

    image_features, text_features: (B, E), L2-normalised, B the same on all ranks. scale: (), the factor
    itself. bias: (). chunk: images whose logits are in memory at a time; default all.
    Returns the loss, (), float32 or wider, and the fraction of its own images whose own text scores best, ().
    All ranks have to call backward once, with the same gradient of the loss.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = widen(image_features), widen(text_features)
        return _Sigmoids.apply(image, text, scale, bias, ranks, chunk or len(image))


class _Sigmoids(torch.autograd.Function):
    """The loss with its gradients in one round of the ring: a rank's texts travel with their gradient."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ranks: World, chunk: int
    ) -> tuple[Tensor, Tensor]:
        count, embed_dim = image.shape
        loss, by_scale, by_bias = torch.zeros(3, dtype=image.dtype, device=image.device)
        by_image = torch.zeros_like(image)
        own = torch.einsum("be,be->b", image, text)
        others = torch.full_like(own, -torch.inf)  # the best similarity with a text of another image
        passing = torch.cat([text, torch.zeros_like(text)], dim=1)
        for hop in range(ranks.size):
            texts, by_text = passing[:, :embed_dim], passing[:, embed_dim:]
            for rows in torch.arange(count, device=image.device).split(chunk):
                similarity = image[rows] @ texts.T
                signs = torch.full_like(similarity, -1.0)
                if hop == 0:
                    diagonal = (torch.arange(len(rows), device=rows.device), rows)
                    signs[diagonal] = 1.0
                logits = signs * (scale * similarity + bias)
                loss -= functional.logsigmoid(logits).sum()
                by_logits = -signs * torch.sigmoid(-logits)
                by_image[rows] += scale * by_logits @ texts
                by_text += scale * by_logits.T @ image[rows]
                by_scale += (by_logits * similarity).sum()
                by_bias += by_logits.sum()
                negatives = similarity.masked_fill(signs > 0, -torch.inf)
                others[rows] = torch.maximum(others[rows], negatives.amax(dim=1))
            passing = _passed_on(passing, ranks)
        # After `size` hops a rank's own texts are back, with the gradients that all ranks added.
        gradients = (by_image, passing[:, embed_dim:], by_scale, by_bias)
        ctx.save_for_backward(*(gradient / count for gradient in gradients))
        accuracy = (own > others).float().mean()
        ctx.mark_non_differentiable(accuracy)
        return loss / count, accuracy

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return (*(gradients[0] * saved for saved in ctx.saved_tensors), None, None)


def _passed_on(rows: Tensor, ranks: World) -> Tensor:
    """Send rows to the next rank of the ring, and receive those of the previous one."""
    if ranks.size == 1:
        return rows
    received = torch.empty_like(rows)
    following, previous = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
    sending = dist.P2POp(dist.isend, rows.contiguous(), following)
    for work in dist.batch_isend_irecv([sending, dist.P2POp(dist.irecv, received, previous)]):
        work.wait()
    return received


def widen(values: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()
