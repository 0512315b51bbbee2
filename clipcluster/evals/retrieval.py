"""Image-text retrieval, by two conventions that measure different things.

Grouped: an image finds its text if any of its captions comes first; identical caption texts are one
candidate, which belongs to all their images. Paired: row i of the (image, caption) pairs must find row i, as
OpenCLIP's training evaluation counts: the other captions and the copies of an image are wrong, so that with
five captions an image a perfect model has R@1 of about 0.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from clipcluster.errors import UserError
from clipcluster.evals.features import (
    Context,
    EvaluationSet,
    Tick,
    encode_images,
    encode_texts,
    from_all_ranks,
)
from clipcluster.evals.ranking import Matches, figures, rank_together
from clipcluster.model.protocols import DualEncoder


@dataclass(frozen=True)
class Captions:
    """Which image has which caption; images are numbered as their feature rows.

    texts: the distinct captions in order of first appearance. captioned: the images with a caption.
    of_image: for each of these its texts. of_text: for each text its images.
    pair_image, pair_text: (pairs,) int64, one row for every caption of every image, copies included.
    """

    texts: list[str]
    captioned: list[int]
    of_image: list[list[int]]
    of_text: list[list[int]]
    pair_image: np.ndarray
    pair_text: np.ndarray


def group(captions: list[list[str]]) -> Captions:
    """Captions of image 0, 1, … into groups; the same text twice under one image is two pairs, one text."""
    numbers: dict[str, int] = {}
    pairs = [
        (image, numbers.setdefault(text, len(numbers))) for image, own in enumerate(captions) for text in own
    ]
    of_text: list[dict[int, None]] = [{} for _ in numbers]
    of_image: dict[int, dict[int, None]] = {}
    for image, text in pairs:
        of_text[text][image] = None
        of_image.setdefault(image, {})[text] = None
    return Captions(
        texts=list(numbers),
        captioned=list(of_image),
        of_image=[list(texts) for texts in of_image.values()],
        of_text=[list(images) for images in of_text],
        pair_image=np.array([image for image, _ in pairs], dtype=np.int64),
        pair_text=np.array([text for _, text in pairs], dtype=np.int64),
    )


def retrieval(
    model: DualEncoder, images: EvaluationSet, context: Context, tick: Tick
) -> Iterator[tuple[str, float]]:
    """The figures of both conventions; see `figures` for the kinds.

    `i2t_*` and `t2i_*` grouped, over the images with a caption and over the distinct captions; `paired_i2t_*`
    and `paired_t2i_*` over the pairs; `images`, `pairs` and `distinct_captions` are the counts behind them.
    Recalls are fractions. Collective; raises UserError where no image has a caption.
    """
    known = encode_images(model, images, context, tick)
    present = known.present.nonzero().flatten()
    by_position = from_all_ranks(known.captions, context.world)
    captions = group([by_position.get(position, []) for position in present.tolist()])
    if not captions.texts:
        raise UserError(f"evaluate.retrieval: no image in {images.folder} has a caption.")
    image = known.features[present]
    text = encode_texts(model, captions.texts, context, tick)
    captioned = image[torch.tensor(captions.captioned, device=image.device)]
    pair_image, pair_text = (
        side[torch.from_numpy(rows).to(image.device)]
        for side, rows in ((image, captions.pair_image), (text, captions.pair_text))
    )
    own_row = Matches([[row] for row in range(len(pair_image))])
    for name, queries, candidates, owners in (
        ("i2t", captioned, text, Matches(captions.of_image)),
        ("t2i", text, image, Matches(captions.of_text)),
        ("paired_i2t", pair_image, pair_text, own_row),
        ("paired_t2i", pair_text, pair_image, own_row),
    ):
        places = rank_together(queries, candidates, owners, context, tick)
        yield from ((f"{name}_{kind}", value) for kind, value in figures(places))
    yield "images", float(len(image))
    yield "pairs", float(len(pair_image))
    yield "distinct_captions", float(len(captions.texts))
