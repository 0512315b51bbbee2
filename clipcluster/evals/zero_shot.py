"""Zero-shot classification: an image's class is the one whose name, put into sentences, lies nearest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from clipcluster.errors import UserError
from clipcluster.evals.classes import accuracies, class_details, classified
from clipcluster.evals.features import Context, EvaluationSet, Measured, Tick, encode_texts
from clipcluster.evals.prompts import PLACEHOLDER, check_templates
from clipcluster.evals.ranking import exact, scores_of
from clipcluster.model.protocols import DualEncoder

PROMPTS = 1 << 16
"""Whose features are held at once (128 MiB at 512 dimensions)."""


def zero_shot(model: DualEncoder, images: EvaluationSet, context: Context, tick: Tick) -> Measured:
    """`zero_shot_…`: `accuracies` over the `zero_shot_images`.

    A class vector is the mean of the normalised embeddings of its templates, normalised again (Radford et
    al. 2021, section 3.1.4). Ties go to the lower class. An image without a class is not counted. The score
    of a confident error is its probability, the softmax of the scaled similarities.
    Collective; raises UserError where class names or templates are missing, and as `classified`.
    """
    classes = exact(class_vectors(model, images, context, tick))
    found = classified(
        images,
        lambda pixels: scores_of(exact(model.encode_image(pixels)), classes),
        model.logit_scale.exp().item(),
        context,
        tick,
        "evaluate.zero_shot",
    )
    metrics = {f"zero_shot_{name}": value for name, value in accuracies(found).items()}
    metrics["zero_shot_images"] = float(len(found.classes))
    return Measured(metrics, class_details(found, images.classnames))


def class_vectors(model: DualEncoder, images: EvaluationSet, context: Context, tick: Tick) -> Tensor:
    """(classes, E) float32, each of length one; the same on every rank. Collective."""
    if not images.classnames or not images.templates:
        missing = "classnames.txt" if not images.classnames else "zeroshot_classification_templates.txt"
        raise UserError(
            f"evaluate.zero_shot: {images.folder} has no {missing} beside its shards (one per line; "
            f"a template holds {PLACEHOLDER} where the class name goes)."
        )
    check_templates(images.templates, f"evaluate.zero_shot: {images.folder}")
    encode = partial(encode_texts, model, context=context, tick=tick)
    return vectors_of(images.classnames, images.templates, encode)


def vectors_of(
    names: Sequence[str], templates: Sequence[str], encode: Callable[[Sequence[str]], Tensor]
) -> Tensor:
    """(classes, E): of each class the mean of its prompts' features, which `encode` gives, of length one.

    Prompts are encoded some classes at a time, since those of all may be millions.
    """
    at_once = max(1, PROMPTS // len(templates))
    means = []
    for start in range(0, len(names), at_once):
        own = names[start : start + at_once]
        texts = [template.replace(PLACEHOLDER, name) for name in own for template in templates]
        means.append(encode(texts).unflatten(0, (len(own), len(templates))).mean(dim=1))
    return functional.normalize(torch.cat(means), dim=-1)
