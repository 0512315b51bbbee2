"""Image-text retrieval, by two conventions that measure different things, and the loss on the same pairs.

Grouped: an image finds its text if any of its captions comes first; identical caption texts are one
candidate, which belongs to all their images. Paired: row i of the (image, caption) pairs must find row i, as
OpenCLIP's training evaluation counts: the other captions and the copies of an image are wrong, so that with
five captions an image a perfect model has R@1 of about 0.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipcluster.errors import UserError
from clipcluster.evals.features import (
    EXAMPLES,
    Context,
    EvaluationSet,
    Measured,
    Tick,
    encode_images,
    encode_texts,
    from_all_ranks,
)
from clipcluster.evals.loss import loss_of_groups
from clipcluster.evals.ranking import CUTS, Pairs, best_of, exact, figures, rank_pairs, scores_of
from clipcluster.model.protocols import DualEncoder

SHOWN = 5  # candidates of an example
Shown = tuple[int, str | None]  # the position of an image, a caption


def retrieval(model: DualEncoder, images: EvaluationSet, context: Context, tick: Tick) -> Measured:
    """The figures of both conventions (`figures_of` names them), and `loss`.

    The loss is that of fixed groups of pairs (`loss_of_groups`), each image with its first caption. `images`,
    `pairs` and `distinct_captions` are the counts behind the figures. Collective; raises UserError where no
    image has a caption.
    """
    known = encode_images(model, images, context, tick)
    present = known.present.nonzero().flatten()
    positions = present.tolist()
    captions = from_all_ranks(known.captions, context.world)
    numbers: dict[str, int] = {}  # of the distinct captions, in order of first appearance
    rows = [
        (row, numbers.setdefault(text, len(numbers)))
        for row, position in enumerate(positions)
        for text in captions.get(position, ())
    ]
    if not rows:
        raise UserError(f"evaluate.retrieval: no image in {images.folder} has a caption.")
    image, text = known.features[present], encode_texts(model, list(numbers), context, tick)
    pairs = Pairs(*torch.tensor(rows, device=image.device).T)
    of_image, of_text = np.array(rows).T
    captioned, first = np.unique(of_image, return_index=True)
    places = rank_pairs(image, text, pairs, context.world, tick)
    places["i2t"] = places["i2t"][captioned]
    firsts = torch.from_numpy(first).to(image.device)
    loss = loss_of_groups(model, image[pairs.images[firsts]], text[pairs.texts[firsts]], context.world, tick)
    counts = {"images": len(image), "pairs": len(rows), "distinct_captions": len(numbers)}
    metrics = {**figures_of(places), "loss": loss, **{name: float(count) for name, count in counts.items()}}

    shown_images = [(position, next(iter(captions.get(position, ())), None)) for position in positions]
    first_image = of_image[np.unique(of_text, return_index=True)[1]]
    shown_texts = [(positions[row], caption) for row, caption in zip(first_image, numbers, strict=True)]
    found = {
        "t2i": _examples((text, image), (of_text, of_image), places["t2i"], (shown_texts, shown_images)),
        "i2t": _examples((image, text), (of_image, of_text), places["i2t"], (shown_images, shown_texts)),
    }
    return Measured(metrics, _with_keys(found, known.keys, context))


def figures_of(places: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The figures by name: those of each direction (`figures`), and of each convention its mean recall.

    places: by direction, (Q,) int from 0: `i2t` and `t2i` grouped, over the images with a caption and over
    the distinct captions; `paired_i2t` and `paired_t2i` over the pairs. Recalls are fractions. `mean_recall`
    and `paired_mean_recall`: the mean of R@1, R@5 and R@10 both ways.
    """
    found = {f"{name}_{kind}": value for name, own in places.items() for kind, value in figures(own)}
    for prefix in ("", "paired_"):
        recalls = [found[f"{prefix}{way}_r{cut}"] for way in ("i2t", "t2i") for cut in CUTS]
        found[f"{prefix}mean_recall"] = float(np.mean(recalls))
    return found


def _examples(
    features: tuple[Tensor, Tensor],
    pairs: tuple[np.ndarray, np.ndarray],
    places: np.ndarray,
    shown: tuple[Sequence[Shown], Sequence[Shown]],
) -> list[dict[str, Any]]:
    """The queries whose match comes last, worst first, with their best candidates.

    features, pairs and shown: of the queries, then of the candidates. places: of the queries in a pair, by
    rising number, from 0.
    """
    (queries, candidates), (of, to) = features, pairs
    worst = np.argsort(-places, kind="stable")[:EXAMPLES]
    numbers = np.unique(of)[worst]
    scores = scores_of(exact(queries[torch.from_numpy(numbers).to(queries.device)]), exact(candidates))
    best = best_of(scores, SHOWN)
    found = []
    for row, (number, place) in enumerate(zip(numbers.tolist(), places[worst].tolist(), strict=True)):
        right = set(to[of == number].tolist())
        top = [
            {"shown": shown[1][own], "score": round(scores[row, own].item(), 4), "right": own in right}
            for own in best[row].tolist()
        ]
        found.append({"query": shown[0][number], "place": place + 1, "top": top})
    return found


def _with_keys(
    examples: dict[str, list[dict[str, Any]]], keys: Mapping[int, tuple[str, str]], context: Context
) -> dict[str, Any]:
    """The examples with shard and key in place of positions, which their ranks know. Collective."""
    every = [one for own in examples.values() for one in own]
    wanted = {one["query"][0] for one in every} | {c["shown"][0] for one in every for c in one["top"]}
    known = from_all_ranks({at: keys[at] for at in wanted & keys.keys()}, context.world)

    def described(shown: Shown) -> dict[str, Any]:
        shard, key = known[shown[0]]
        return {"shard": shard, "key": key, "caption": shown[1]}

    return {
        way: [
            {
                "query": described(one["query"]),
                "place": one["place"],
                "top": [{**described(c.pop("shown")), **c} for c in one["top"]],
            }
            for one in own
        ]
        for way, own in examples.items()
    }
