"""Classification: an image tower with a linear head, and the cross entropy of its logits."""

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
from clipcluster.model.task import Features, Report, Task
from clipcluster.model.towers import ImageTower, build_image_tower
from clipcluster.model.weights import Coverage, load_weights_of

if TYPE_CHECKING:
    from clipcluster.data.loading.batch import Batch
    from clipcluster.data.tokenizer import Tokenizer
    from clipcluster.model.protocols import Classifier
    from clipcluster.recipe.sections.recipe import Recipe
    from clipcluster.runtime.world import World

HEAD_STD = 0.02
"""Standard deviation of a fresh head's weights, truncated at two of them, as timm's networks have it."""


class ImageClassifier(nn.Module):
    """An image tower and a linear head: (B, 3, S, S) float -> (B, classes).

    The tower is called `image` as in a dual encoder, which can therefore start from a classifier's weights.
    `starting_weights` says what the files brought, one entry a file.
    """

    def __init__(self, image: ImageTower, classes: int) -> None:
        super().__init__()
        self.image = image
        self.head = nn.Linear(image.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD, a=-2 * HEAD_STD, b=2 * HEAD_STD)
        nn.init.zeros_(self.head.bias)
        self.starting_weights: tuple[Coverage, ...] = ()

    def classify(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float, normalised pixels -> logits (B, classes), float32 or wider."""
        return widen(self.head(self.image(images)))


class ClassifyTask(Task):
    """Images and their classes into the cross entropy, a mean over samples.

    mean, std: of the pixels in 0..1, one a channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Classifier, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(tuple(mean)), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)), persistent=False)

    def encode(self, batch: Batch) -> Features:
        """`logits` (b, C), and `classes` (b,) int64."""
        assert batch.classes is not None, "every sample was checked to have a class"
        logits = self.model.classify(normalise(batch.images, self.mean, self.std))
        return {"logits": logits, "classes": batch.classes}

    def loss(self, features: Features) -> Report:
        logits, classes = features["logits"], features["classes"]
        with torch.autocast(logits.device.type, enabled=False):
            loss = functional.cross_entropy(logits, classes)
        accuracy = (logits.detach().argmax(dim=1) == classes).float().mean()
        return Report(loss, {"loss": loss.detach(), "batch_accuracy": accuracy})


def build_classifier(
    recipe: Recipe, tokenizer: Tokenizer | None, assets: Path | None = None, starting_weights: bool = True
) -> ImageClassifier:
    """The model of a recipe's `model` section, in float32 on the CPU, as `clipcluster.model.clip.build_clip`.

    Raises UserError for an unknown tower, a setting it does not take, weights that do not match, and where
    nothing tells the number of classes.
    """
    tower = recipe.model.image
    if not starting_weights:
        tower = tower.model_copy(update={"weights": None})
    image, coverage = build_image_tower(
        tower, image_size=recipe.data.image.size, weights_from=recipe.model.weights_from
    )
    classifier = ImageClassifier(image, _classes(recipe))
    classifier.starting_weights = (coverage,) if coverage else ()
    if recipe.model.weights and starting_weights:
        classifier.starting_weights = (load_weights_of(recipe.model, classifier),)
    return classifier


def build_classify(recipe: Recipe, model: Classifier, ranks: World) -> ClassifyTask:
    """`task: classify`."""
    return ClassifyTask(model, recipe.data.image.mean, recipe.data.image.std)


def _classes(recipe: Recipe) -> int:
    if recipe.model.classes is not None:
        return recipe.model.classes
    cache = Cache.of(recipe.data.cache)
    return class_count(None, [open_source(source, text=False, cache=cache) for source in recipe.data.train])
