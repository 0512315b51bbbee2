"""Distillation: a student learns from what teachers make of the same images and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from clipcluster.data.loading import stored
from clipcluster.model.losses import gather, widen
from clipcluster.model.task import ContrastiveTask, Features, Report, build_contrastive

if TYPE_CHECKING:
    from clipcluster.data.loading.batch import Batch
    from clipcluster.model.protocols import DualEncoder
    from clipcluster.recipe.sections.distill import Distill
    from clipcluster.recipe.sections.recipe import Recipe
    from clipcluster.runtime.world import World


@dataclass(frozen=True)
class Teacher:
    """What a teacher makes of a rank's samples: image and text (B, D) of length one, and its scale."""

    image: Tensor
    text: Tensor
    scale: float


def relational(
    image: Tensor, text: Tensor, scale: Tensor, teachers: Sequence[Teacher], ranks: World
) -> Tensor:
    """How far the student's similarities over the batch of all ranks are from the teachers'.

    The Kullback-Leibler divergence of the student's distribution over the batch's texts, for each image, from
    each teacher's, and the same from text to image: the mean over samples, teachers and both directions
    (Vasu et al. 2024, "MobileCLIP", L_Distill of section 3.2; with one teacher the contrastive relational
    distillation of Yang et al. 2024, "CLIP-KD", section 3.2, whose two directions are added there). The mean
    of the ranks' values is that of the whole batch, and so are the gradients, as for the contrastive loss.

    image, text: (B, E) of length one. scale: (), the student's own factor. Returns (), float32 or wider.
    """
    with torch.autocast(image.device.type, enabled=False):
        student = _logits(widen(image), widen(text), scale, ranks)
        total = torch.zeros((), dtype=student[0].dtype, device=image.device)
        for logits, of_teachers in zip(student, _distributions(teachers, ranks), strict=True):
            target = torch.stack(of_teachers).mean(dim=0)
            entropy = torch.stack([torch.special.entr(own).sum(dim=1) for own in of_teachers]).mean(dim=0)
            cross = -(target * functional.log_softmax(logits, dim=1)).sum(dim=1)
            total = total + (cross - entropy).mean() / 2
    return total


def _logits(image: Tensor, text: Tensor, scale: Any, ranks: World) -> tuple[Tensor, Tensor]:
    """This rank's images by all texts, and its texts by all images, (B, size x B) each."""
    everyone = gather(torch.cat([image, text], dim=1), ranks)
    all_images, all_texts = everyone.split(image.shape[1], dim=1)
    return scale * image @ all_texts.T, scale * text @ all_images.T


@torch.no_grad()
def _distributions(teachers: Sequence[Teacher], ranks: World) -> tuple[list[Tensor], list[Tensor]]:
    """Each teacher's distributions from image to text and from text to image, (B, size x B)."""
    logits = [_logits(widen(own.image), widen(own.text), own.scale, ranks) for own in teachers]
    return [to_text.softmax(dim=1) for to_text, _ in logits], [
        to_image.softmax(dim=1) for _, to_image in logits
    ]


class DistillTask(ContrastiveTask):
    """A student beside teachers whose embeddings are stored with the samples.

    student: the task of the student alone. The loss of a set of pairs is `contrastive_weight` times that
    task's plus `weight` times `relational`. With synthetic captions there are two sets, the images with their
    own captions and the same images with synthetic ones, and the losses are added (Vasu et al. 2024, section
    3.2).
    """

    def __init__(self, student: ContrastiveTask, settings: Distill) -> None:
        super().__init__(student.model, (), (), student.ranks, student.choice)
        self.mean, self.std, self.settings = student.mean, student.std, settings

    def encode(self, batch: Batch) -> Features:
        """`image`, `text` and, where there are synthetic captions, `synthetic`: (b, E) of length one each."""
        features = dict(super().encode(batch))
        if stored.TOKENS in batch.extras:
            tokens, mask = batch.tensor(stored.TOKENS), batch.tensor(stored.MASK)
            features["synthetic"] = self.model.encode_text(tokens, mask)
        return features

    def targets(self, batch: Batch) -> Features:
        """The teachers' embeddings: `image_emb`, `text_emb` and, as above, `synthetic_emb`, (b, D)."""
        names = (stored.IMAGE, stored.TEXT, stored.SYNTHETIC_TEXT)
        return {name: batch.tensor(name) for name in names if name in batch.extras}

    def loss(self, features: Features) -> Report:
        scale, settings = self.model.logit_scale.exp().squeeze(), self.settings
        metrics = {"logit_scale": scale.detach()}
        losses: dict[str, list[Tensor]] = {"contrastive_loss": [], "distill_loss": []}
        for text, embedding in (("synthetic", stored.SYNTHETIC_TEXT), ("text", stored.TEXT)):
            if text in features:
                pairs = {"image": features["image"], "text": features[text]}
                if settings.contrastive_weight:
                    report = super().loss(pairs)
                    losses["contrastive_loss"].append(report.loss)
                    metrics |= report.metrics
                teachers = self._teachers(features[stored.IMAGE], features[embedding])
                losses["distill_loss"].append(
                    relational(**pairs, scale=scale, teachers=teachers, ranks=self.ranks)
                )
        sums = {name: torch.stack(values).sum() for name, values in losses.items() if values}
        weights = {"contrastive_loss": settings.contrastive_weight, "distill_loss": settings.weight}
        loss = torch.stack([weights[name] * value for name, value in sums.items()]).sum()
        metrics |= {name: value.detach() for name, value in {"loss": loss, **sums}.items()}
        return Report(loss, metrics)

    def _teachers(self, image: Tensor, text: Tensor) -> list[Teacher]:
        """The teachers whose embeddings lie side by side in these rows."""
        assert self.settings.stored is not None
        widths, scale = self.settings.stored.widths, self.settings.stored.scale
        parts = zip(image.split(widths, dim=1), text.split(widths, dim=1), strict=True)
        return [Teacher(of_image, of_text, scale) for of_image, of_text in parts]


def build_distill(recipe: Recipe, model: DualEncoder, ranks: World) -> DistillTask:
    """`task: distill`. UserError as `build_contrastive`."""
    assert recipe.distill is not None
    return DistillTask(build_contrastive(recipe, model, ranks), recipe.distill)
