"""Classification: an image tower with a linear head, and the cross-entropy of its logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipcluster.data.loading.batch import normalise
from clipcluster.data.shards.classes import class_count
from clipcluster.data.shards.open import open_source
from clipcluster.data.storage.cache import Cache
from clipcluster.model.losses import widen
from clipcluster.model.mixup import Mixer, swapped
from clipcluster.model.task import Features, Report, Task
from clipcluster.model.towers import ImageTower, build_image_tower
from clipcluster.model.weights import Coverage, load_head, load_weights_of

if TYPE_CHECKING:
    from clipcluster.data.loading.batch import Batch
    from clipcluster.data.tokenizer import Tokenizer
    from clipcluster.model.protocols import Classifier
    from clipcluster.recipe.sections.recipe import Recipe
    from clipcluster.runtime.world import World

HEAD_STD = 0.02
"""Standard deviation of a head's random weights, truncated at two of them, as in timm's networks."""


class ImageClassifier(nn.Module):
    """An image tower and a linear head: (B, 3, S, S) float -> (B, classes).

    The tower is called `image` as in a dual encoder, which can therefore start from a classifier's weights.
    `starting_weights` lists what was loaded, one entry per file. head_init_scale: factor of the head's random
    weights.
    """

    def __init__(self, image: ImageTower, classes: int, *, head_init_scale: float = 1.0) -> None:
        super().__init__()
        self.image = image
        self.head = nn.Linear(image.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD, a=-2 * HEAD_STD, b=2 * HEAD_STD)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)
        self.embed_dim = image.width
        self.starting_weights: tuple[Coverage, ...] = ()

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float, normalised pixels -> the tower's features (B, width), of length one."""
        return functional.normalize(widen(self.image(images)), dim=-1)

    def classify(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float, normalised pixels -> logits (B, classes), float32 or wider."""
        return widen(self.head(self.image(images)))


class ClassifyTask(Task):
    """The cross-entropy of images and their classes, a mean over samples.

    mean, std: of the pixels in 0..1, one value per channel. label_smoothing: fraction of each target that is
    spread evenly over all classes (Szegedy et al. 2016, section 7). mixer: mixup and cutmix, or None.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: Classifier,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        label_smoothing: float = 0.0,
        mixer: Mixer | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing, self.mixer = label_smoothing, mixer
        self.register_buffer("mean", torch.tensor(tuple(mean)), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)), persistent=False)

    def encode(self, batch: Batch) -> Features:
        """`logits` (b, C) and `classes` (b,) int64; of mixed images also `others`, the classes mixed in, and
        `own` (b,), the weight of the sample's own class.
        """
        assert batch.classes is not None, "every sample was checked to have a class"
        images = normalise(batch.images, self.mean, self.std)
        features = {"classes": batch.classes}
        if self.mixer is not None:
            first_slot = batch.keys[0][0]
            images, own = self.mixer(images, batch.index, first_slot)
            features |= {"others": swapped(batch.classes), "own": own}
        return {**features, "logits": self.model.classify(images)}

    def loss(self, features: Features) -> Report:
        """The mean cross-entropy; `batch_accuracy` is that of the class with the larger weight."""
        logits, classes = features["logits"], features["classes"]
        shown = classes
        with torch.autocast(logits.device.type, enabled=False):
            loss = self._cross_entropy(logits, classes)
            if "own" in features:
                own, others = features["own"], features["others"]
                loss = own * loss + (1 - own) * self._cross_entropy(logits, others)
                shown = torch.where(own < 0.5, others, classes)
            loss = loss.mean()
        accuracy = (logits.detach().argmax(dim=1) == shown).float().mean()
        return Report(loss, {"loss": loss.detach(), "batch_accuracy": accuracy})

    def _cross_entropy(self, logits: Tensor, classes: Tensor) -> Tensor:
        """The cross-entropy of each sample, (b,)."""
        return functional.cross_entropy(
            logits, classes, reduction="none", label_smoothing=self.label_smoothing
        )


def build_classifier(
    recipe: Recipe, tokenizer: Tokenizer | None, assets: Path | None = None, starting_weights: bool = True
) -> ImageClassifier:
    """The model of a recipe's `model` section, in float32 on the CPU, as `clipcluster.model.clip.build_clip`.

    Raises UserError for an unknown tower, a setting it does not take, weights that do not match, and where
    nothing tells the number of classes.
    """
    tower = recipe.model.image
    assert tower is not None
    image, coverage = build_image_tower(
        tower,
        image_size=recipe.data.image.size,
        assets=assets,
        weights_from=recipe.model.weights_from,
        starting_weights=starting_weights,
    )
    classifier = ImageClassifier(image, _classes(recipe), head_init_scale=recipe.model.head_init_scale)
    if coverage:
        classifier.starting_weights = (load_head(classifier.head, coverage),)
    if recipe.model.weights and starting_weights:
        classifier.starting_weights = (load_weights_of(recipe.model, classifier),)
    return classifier


def build_classify(
    recipe: Recipe, model: Classifier, ranks: World, assets: Path | None = None
) -> ClassifyTask:
    """`task: classify`."""
    image, mixup = recipe.data.image, recipe.data.mixup
    return ClassifyTask(
        model,
        image.mean,
        image.std,
        label_smoothing=recipe.loss.label_smoothing,
        mixer=Mixer(mixup, recipe.seed) if mixup else None,
    )


def _classes(recipe: Recipe) -> int:
    if recipe.model.classes is not None:
        return recipe.model.classes
    cache = Cache.of(recipe.data.cache)
    return class_count(None, [open_source(source, text=False, cache=cache) for source in recipe.data.train])
