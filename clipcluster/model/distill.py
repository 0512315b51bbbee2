"""Distillation: a student learns from the features that teachers give for the same images and captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipcluster.data.loading import stored
from clipcluster.data.loading.batch import normalise
from clipcluster.model.losses import gather, widen
from clipcluster.model.task import ContrastiveTask, Features, Report
from clipcluster.model.weight_files import PROJECTIONS

if TYPE_CHECKING:
    from clipcluster.data.loading.batch import Batch
    from clipcluster.model.protocols import DualEncoder
    from clipcluster.recipe.sections.distill import Distill
    from clipcluster.runtime.world import World


@dataclass(frozen=True)
class TeacherFeatures:
    """A teacher's features of a rank's samples, image and text (B, D), L2-normalised; and its logit scale."""

    image: Tensor
    text: Tensor
    scale: Tensor | float


class Teacher:
    """A frozen dual encoder: never trained, always in evaluation mode, in no checkpoint and under no wrapper.

    It is no submodule of the task.

    Args:
        size: side of the teacher's images in pixels.
        mean, std: of the pixels in 0..1, as the teacher was trained with.
        tokens: names of tokens and mask in `batch.extras`, for a teacher with a tokenizer of its own.
        scale: logit scale of the teacher; default its own.
    """

    def __init__(
        self,
        model: DualEncoder,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        tokens: tuple[str, str] | None = None,
        scale: float | None = None,
    ) -> None:
        self.model, self.size, self.tokens = model.eval().requires_grad_(False), size, tokens
        self.mean, self.std = torch.tensor(tuple(mean)), torch.tensor(tuple(std))
        self._scale = scale

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features of images and captions, (b, D) each, L2-normalised; images of another size are resized."""
        images = normalise(batch.images, self.mean, self.std)
        if images.shape[-1] != self.size:
            sides = (self.size, self.size)
            images = functional.interpolate(images, sides, mode="bicubic", antialias=True)
        tokens, mask = batch.tokens, batch.mask
        if self.tokens is not None:
            tokens, mask = (batch.tensor(name) for name in self.tokens)
        assert tokens is not None
        assert mask is not None
        return self.model.encode_image(images), self.model.encode_text(tokens, mask)

    @property
    def scale(self) -> Tensor | float:
        return self.model.logit_scale.detach().exp().squeeze() if self._scale is None else self._scale

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to all of its tensors, as a module's `_apply` does."""
        self.model._apply(change)
        self.mean, self.std = change(self.mean), change(self.std)


def relational(
    image: Tensor, text: Tensor, scale: Tensor, teachers: Sequence[TeacherFeatures], ranks: World
) -> Tensor:
    """The distillation loss of the student's similarities over the batch of all ranks.

    For each image, the Kullback-Leibler divergence KL(teacher || student) of the distributions over the
    batch's texts, and for each text of those over the images: the mean over samples, teachers and directions
    (Vasu et al. 2024, "MobileCLIP", L_Distill of section 3.2; with one teacher the contrastive relational
    distillation of Yang et al. 2024, "CLIP-KD", section 3.2, whose two directions are added there). The mean
    of the ranks' values is that of the whole batch, and so are the gradients, as for the contrastive loss.

    image, text: (B, E), L2-normalised. scale: (), the student's logit scale. Returns (), float32 or wider.
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
    """Logits of this rank's images over all texts, and of its texts over all images, (B, ranks x B) each."""
    everyone = gather(torch.cat([image, text], dim=1), ranks)
    all_images, all_texts = everyone.split(image.shape[1], dim=1)
    return scale * image @ all_texts.T, scale * text @ all_images.T


@torch.no_grad()
def _distributions(teachers: Sequence[TeacherFeatures], ranks: World) -> tuple[list[Tensor], list[Tensor]]:
    """Each teacher's distributions, (B, ranks x B): over texts for each image, over images for each text."""
    logits = [_logits(widen(own.image), widen(own.text), own.scale, ranks) for own in teachers]
    return [to_text.softmax(dim=1) for to_text, _ in logits], [
        to_image.softmax(dim=1) for _, to_image in logits
    ]


def feature_mse(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean squared error of image features plus that of text features, ().

    student, teacher: image and text features, (B, D) each, L2-normalised. The mean is over all entries (Yang
    et al. 2024, "CLIP-KD", section 3.3, as its code has it).
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([functional.mse_loss(widen(own), widen(given)) for own, given in pairs]).sum()


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - the mean cosine similarity of image features, (B, D) each, L2-normalised; ().

    It is the distillation loss of Chinese-CLIP, whose code detaches the student's features, so that it trains
    nothing there; here it has its gradient.
    """
    return 1 - (widen(student) * widen(teacher)).sum(dim=1).mean()


class DistillTask(ContrastiveTask):
    """A student with teachers: frozen models, or embeddings that are stored with the samples.

    student: the task of the student alone. The loss of a set of pairs is `contrastive_weight` times that
    task's, plus `weight` times `relational`, plus the weighted feature losses, each a mean over teachers.
    With synthetic captions there are two sets, the images with their own captions and the same images with
    synthetic ones, and the losses are added (Vasu et al. 2024, section 3.2). frozen: name -> file of a
    teacher's weights.

    For a feature loss with a teacher of another width the student gets `teacher_projections`, a linear map
    without bias into the teacher's space. They train, and no model but this student has them.
    """

    def __init__(
        self,
        student: ContrastiveTask,
        settings: Distill,
        teachers: Sequence[Teacher] = (),
        frozen: Mapping[str, Path] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(student.model, (), (), student.ranks, student.choice)
        self.mean, self.std, self.settings = student.mean, student.std, settings
        self.teachers, self.frozen = tuple(teachers), dict(frozen or {})
        if settings.feature_mse or settings.feature_cosine:
            widths = settings.stored.widths if settings.stored else [own.model.embed_dim for own in teachers]
            sides = ("image", "text") if settings.feature_mse else ("image",)
            setattr(self.model, PROJECTIONS, _projections(self.model.embed_dim, widths, sides, seed))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for teacher in self.teachers:
            teacher.move(fn)
        return super()._apply(fn, recurse)

    def encode(self, batch: Batch) -> Features:
        """`image`, `text` and, where there are synthetic captions, `synthetic`: (b, E), L2-normalised."""
        features = dict(super().encode(batch))
        if stored.TOKENS in batch.extras:
            tokens, mask = batch.tensor(stored.TOKENS), batch.tensor(stored.MASK)
            features["synthetic"] = self.model.encode_text(tokens, mask)
        return features

    def targets(self, batch: Batch) -> Features:
        """The teachers' features: `image_emb`, `text_emb`, `synthetic_emb`, or `image-0`, `text-0`, …"""
        names = (stored.IMAGE, stored.TEXT, stored.SYNTHETIC_TEXT)
        features = {name: batch.tensor(name) for name in names if name in batch.extras}
        for number, teacher in enumerate(self.teachers):
            features[f"image-{number}"], features[f"text-{number}"] = teacher(batch)
        return features

    def loss(self, features: Features) -> Report:
        settings, scale = self.settings, self.model.logit_scale.exp().squeeze()
        weights = {
            "contrastive_loss": settings.contrastive_weight,
            "distill_loss": settings.weight,
            "feature_mse": settings.feature_mse,
            "feature_cosine": settings.feature_cosine,
        }
        parts: dict[str, list[Tensor]] = {name: [] for name, weight in weights.items() if weight}
        metrics = {"logit_scale": scale.detach()}
        for text in ("synthetic", "text"):
            if text in features:
                pairs, teachers = (features["image"], features[text]), self._teacher_features(features, text)
                if settings.contrastive_weight:
                    report = super().loss({"image": pairs[0], "text": pairs[1]})
                    parts["contrastive_loss"].append(report.loss)
                    metrics |= report.metrics
                if settings.weight:
                    parts["distill_loss"].append(relational(*pairs, scale, teachers, self.ranks))
                for number, teacher in enumerate(teachers):
                    for name, value in self._feature_losses(number, pairs, teacher).items():
                        parts[name].append(value / len(teachers))
        sums = {name: torch.stack(values).sum() for name, values in parts.items()}
        loss = torch.stack([weights[name] * value for name, value in sums.items()]).sum()
        metrics |= {name: value.detach() for name, value in {"loss": loss, **sums}.items()}
        return Report(loss, metrics)

    def _teacher_features(self, features: Features, text: str) -> list[TeacherFeatures]:
        """Each teacher's features of the images and of one set of captions, `text` or `synthetic`."""
        if self.settings.stored is None:
            numbered = enumerate(self.teachers)
            return [
                TeacherFeatures(features[f"image-{n}"], features[f"text-{n}"], own.scale)
                for n, own in numbered
            ]
        widths, scale = self.settings.stored.widths, self.settings.stored.scale
        of_text = features[stored.TEXT if text == "text" else stored.SYNTHETIC_TEXT]
        parts = zip(features[stored.IMAGE].split(widths, dim=1), of_text.split(widths, dim=1), strict=True)
        return [TeacherFeatures(*pair, scale) for pair in parts]

    def _feature_losses(
        self, number: int, pairs: Sequence[Tensor], teacher: TeacherFeatures
    ) -> dict[str, Tensor]:
        """The feature losses in use, for one teacher, whose features carry no gradient."""
        settings, found = self.settings, {}
        given = teacher.image.detach(), teacher.text.detach()
        with torch.autocast(pairs[0].device.type, enabled=False):
            if settings.feature_mse:
                own = [self._projected(number, *side) for side in zip(("image", "text"), pairs, strict=True)]
                found["feature_mse"] = feature_mse(own, given)
            if settings.feature_cosine:
                found["feature_cosine"] = feature_cosine(self._projected(number, "image", pairs[0]), given[0])
        return found

    def _projected(self, number: int, side: str, features: Tensor) -> Tensor:
        """The student's features in a teacher's space, L2-normalised."""
        projections: Any = getattr(self.model, PROJECTIONS)
        name = f"{side}-{number}"
        features = widen(features)
        return functional.normalize(projections[name](features), dim=-1) if name in projections else features


def _projections(width: int, teachers: Sequence[int], sides: Sequence[str], seed: int) -> nn.ModuleDict:
    """Linear maps from `width` into the spaces of teachers of other widths; random by the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    found = nn.ModuleDict()
    for number, own in enumerate(teachers):
        for side in sides if own != width else ():
            linear = nn.Linear(width, own, bias=False)
            nn.init.normal_(linear.weight, std=width**-0.5, generator=generator)
            found[f"{side}-{number}"] = linear
    return found
