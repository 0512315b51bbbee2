"""Accuracy and loss of a classifier on images with known classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from clipcluster.errors import UserError
from clipcluster.evals.features import Context, EvaluationSet, Tick, evaluation_pixels
from clipcluster.evals.ranking import first_match
from clipcluster.model.protocols import Classifier


def classification(
    model: Classifier, images: EvaluationSet, context: Context, tick: Tick
) -> Iterator[tuple[str, float]]:
    """`top1`, `top5` (absent below five classes), fractions of the `classified_images`; `loss`, their mean.

    The loss is the cross entropy without label smoothing. Ties go to the lower class. An image without a
    class is not counted. Collective; raises UserError where none has one, or a class is not the model's.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=context.world.device)  # top-1, top-5, loss, images
    classes, highest = 0, -1
    for batch, pixels in evaluation_pixels(images, context, tick):
        logits = model.classify(pixels).float()
        classes, known = logits.shape[1], batch.classes >= 0
        highest = max(highest, int(batch.classes.max()))
        if known.any() and highest < classes:
            labels = batch.classes[known].to(logits.device)
            logits = logits[known.to(logits.device)]
            own = labels[:, None] == torch.arange(classes, device=logits.device)
            places = first_match(logits, own)
            losses = functional.cross_entropy(logits, labels, reduction="none")
            columns = (places < 1, places < 5, losses, torch.ones_like(losses))
            sums += torch.stack([column.double().sum() for column in columns])
    facts = context.world.gather((classes, highest))
    classes, highest = (max(values) for values in zip(*facts, strict=True))
    top1, top5, loss, count = context.world.all_reduce_sum(sums).tolist()
    if highest >= classes:
        raise UserError(
            f"evaluate.classification: {images.folder} has an image of class {highest}, and the model "
            f"{classes:,} classes (0 to {classes - 1}). Convert both datasets with one list of classes."
        )
    if not count:
        raise UserError(
            f"evaluate.classification: no image in {images.folder} has a class (KEY.cls in its shards). "
            "Convert it with classes, or remove it."
        )
    yield "top1", top1 / count
    if classes >= 5:
        yield "top5", top5 / count
    yield "loss", loss / count
    yield "classified_images", count
