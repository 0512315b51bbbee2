"""Zero-shot classification: an image's class is the one whose name, put into sentences, lies nearest."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clipcluster.errors import UserError
from clipcluster.evals.features import (
    Context,
    EvaluationSet,
    Tick,
    encode_images,
    encode_texts,
    from_all_ranks,
)
from clipcluster.evals.ranking import Matches, rank_together
from clipcluster.model.protocols import DualEncoder

PLACEHOLDER = "{c}"


def zero_shot(
    model: DualEncoder, images: EvaluationSet, context: Context, tick: Tick
) -> Iterator[tuple[str, float]]:
    """`zero_shot_top1`, `zero_shot_top5` (absent below five classes), fractions of the `zero_shot_images`.

    A class vector is the mean of the normalised embeddings of its templates, normalised again (Radford et
    al. 2021, section 3.1.4). Ties go to the lower class. An image without a class is not counted.
    Collective; raises UserError where class names or templates are missing, or a class is out of range.
    """
    classes = class_vectors(model, images, context, tick)
    known = encode_images(model, images, context, tick)
    labels = from_all_ranks({p: c for p, c in known.classes.items() if c >= 0}, context.world)
    if not labels:
        raise UserError(
            f"evaluate.zero_shot: no image in {images.folder} has a class (KEY.cls in its shards)."
        )
    if max(labels.values()) >= len(classes):
        raise UserError(
            f"evaluate.zero_shot: {images.folder} has an image of class {max(labels.values())}, but its "
            f"classnames.txt names {len(classes)} classes (0 to {len(classes) - 1})."
        )
    positions = torch.tensor(list(labels), device=classes.device)
    own = Matches(np.arange(len(labels)), np.array(list(labels.values())))
    places = rank_together(known.features[positions], classes, own, context, tick)
    yield "zero_shot_top1", float((places < 1).mean())
    if len(classes) >= 5:
        yield "zero_shot_top5", float((places < 5).mean())
    yield "zero_shot_images", float(len(labels))


def class_vectors(model: DualEncoder, images: EvaluationSet, context: Context, tick: Tick) -> Tensor:
    """(classes, E) float32, each of length one; the same on every rank. Collective."""
    if not images.classnames or not images.templates:
        missing = "classnames.txt" if not images.classnames else "zeroshot_classification_templates.txt"
        raise UserError(
            f"evaluate.zero_shot: {images.folder} has no {missing} beside its shards (one a line; "
            f"a template holds {PLACEHOLDER} where the class name goes)."
        )
    without = [template for template in images.templates if PLACEHOLDER not in template]
    if without:
        raise UserError(
            f"evaluate.zero_shot: a template in {images.folder} has no {PLACEHOLDER} for the "
            f"class name: {without[0]!r}"
        )
    texts = [t.replace(PLACEHOLDER, name) for name in images.classnames for t in images.templates]
    features = encode_texts(model, texts, context, tick)
    means = features.unflatten(0, (len(images.classnames), len(images.templates))).mean(dim=1)
    return functional.normalize(means, dim=-1)
