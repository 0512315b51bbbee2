"""Which class the images of a set are given: accuracies, confused classes, confident errors."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clipcluster.errors import UserError
from clipcluster.evals.features import EXAMPLES, Context, EvaluationSet, Tick, evaluation_pixels
from clipcluster.evals.ranking import TIE, places_of

Error = tuple[float, int, str, str, int, int]  # minus the score, position, shard, key, class, class given
_COLUMNS = 4  # class + 1, place of the class, the class given, loss


@dataclass(frozen=True)
class Classified:
    """The images of a set that have a class, by rising position, the same on every rank; (n,) each.

    classes, places (of the image's class, from 0) and given (the class that scores best; where the place is
    0, the best wrong one) int64, losses float64. count: the classes that there are. errors: those with the
    highest scores.
    """

    classes: np.ndarray
    places: np.ndarray
    given: np.ndarray
    losses: np.ndarray
    count: int
    errors: Sequence[Error]


def classified(
    images: EvaluationSet,
    scores: Callable[[Tensor], Tensor],
    scale: float,
    context: Context,
    tick: Tick,
    what: str,
) -> Classified:
    """Give every image of a set that has a class the class with the highest score.

    scores: normalised pixels (b, 3, S, S) -> (b, classes); times `scale` they are logits. Ties go to the
    lower class. what: the recipe's key, for messages. Collective; raises UserError where no image has a
    class, or one has a class that there is not.
    """
    world = context.world
    table = torch.zeros(images.samples, _COLUMNS, dtype=torch.float64, device=world.device)
    errors: list[Error] = []
    count = 0
    for batch, pixels in evaluation_pixels(images, context, tick):
        found = scores(pixels).double()
        count = found.shape[1]
        rows = batch.positions.to(world.device)
        table[rows, 0] = batch.classes.to(world.device).double() + 1
        known = (batch.classes >= 0) & (batch.classes < count)
        if known.any():
            own = batch.classes[known].to(world.device)
            judged, confidence = _judged(found[known.to(world.device)], own, scale)
            table[rows[known.to(world.device)], 1:] = judged
            numbers = known.nonzero().flatten().tolist()
            keys = [(int(batch.positions[number]), *batch.keys[number]) for number in numbers]
            errors = heapq.nsmallest(EXAMPLES, [*errors, *_errors(keys, own, judged, confidence)])
    count = max(world.gather(count))
    of_all = [tuple(error) for own in world.gather(errors) for error in own]
    judged_all = world.all_reduce_sum(table).cpu().numpy()
    judged_all = judged_all[judged_all[:, 0] > 0]
    classes, places, given = judged_all[:, :3].T.astype(np.int64)
    classes = classes - 1
    if not len(classes):
        raise UserError(f"{what}: no image in {images.folder} has a class (KEY.cls in its shards).")
    if classes.max() >= count:
        raise UserError(
            f"{what}: {images.folder} has an image of class {classes.max()}, and there are {count:,} classes "
            f"(0 to {count - 1}); use one list of classes for images and model."
        )
    return Classified(classes, places, given, judged_all[:, 3], count, heapq.nsmallest(EXAMPLES, of_all))


def _judged(scores: Tensor, own: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(b, 3) float64: place of the own class, best wrong class, loss; and (b,) the probability of that class.

    scores: (b, C) float64.
    """
    places = places_of(scores, own)
    wrong = scores.nan_to_num(nan=-math.inf).scatter(1, own[:, None], -math.inf)
    given = (wrong >= wrong.amax(dim=1, keepdim=True) - TIE).to(torch.uint8).argmax(dim=1)
    logits = scale * scores
    losses = functional.cross_entropy(logits, own, reduction="none")
    confidence = logits.softmax(dim=1).gather(1, given[:, None])[:, 0]
    return torch.stack([places.double(), given.double(), losses], dim=1), confidence


def _errors(
    keys: Sequence[tuple[int, str, str]], own: Tensor, judged: Tensor, confidence: Tensor
) -> list[Error]:
    """The images given a wrong class; scores with four digits, so that the last bits decide no order."""
    rows = zip(keys, own.tolist(), judged.tolist(), confidence.nan_to_num(nan=0.0).tolist(), strict=True)
    return [
        (-round(score, 4), position, shard, key, label, int(given))
        for (position, shard, key), label, (place, given, _), score in rows
        if place > 0
    ]


def accuracies(found: Classified) -> dict[str, float]:
    """`top1`, `top5` (absent below five classes) and `mean_per_class`, fractions.

    mean_per_class: the mean of the top-1 of each class that has images, as CLIP_benchmark's
    `mean_per_class_recall`.
    """
    images, right = _per_class(found)
    present = images > 0
    figures = {"top1": float(np.mean(found.places < 1))}
    if found.count >= 5:
        figures["top5"] = float(np.mean(found.places < 5))
    figures["mean_per_class"] = float(np.mean(right[present] / images[present]))
    return figures


def _per_class(found: Classified) -> tuple[np.ndarray, np.ndarray]:
    """Images of each class, and those of them that were given it, (C,) each."""
    right = found.classes[found.places == 0]
    return np.bincount(found.classes, minlength=found.count), np.bincount(right, minlength=found.count)


def class_details(found: Classified, names: Sequence[str] | None) -> dict[str, Any]:
    """What people look at: the worst classes, the most confused pairs, the most confident errors.

    names: of the classes, by number; where nothing names one it is called by its number. Each list has at
    most EXAMPLES entries.
    """

    def named(number: int) -> str:
        return names[number] if names and number < len(names) else str(number)

    images, right = _per_class(found)
    top1 = right / np.maximum(images, 1)
    worst = [own for own in np.lexsort((-images, top1)).tolist() if images[own]][:EXAMPLES]
    wrong = found.places > 0
    pairs = found.classes[wrong] * found.count + found.given[wrong]
    codes, counts = np.unique(pairs, return_counts=True)
    confused = [
        (*divmod(int(codes[n]), found.count), int(counts[n])) for n in np.lexsort((codes, -counts))[:EXAMPLES]
    ]
    return {
        "classes": [
            {"class": n, "name": named(n), "images": int(images[n]), "top1": float(top1[n])} for n in worst
        ],
        "confused": [
            {"class": own, "name": named(own), "as": given, "as_name": named(given), "images": count}
            for own, given, count in confused
        ],
        "confident_errors": [
            {
                "shard": shard,
                "key": key,
                "class": own,
                "name": named(own),
                "as": given,
                "as_name": named(given),
                "score": -score,
            }
            for score, _, shard, key, own, given in found.errors
        ],
    }
