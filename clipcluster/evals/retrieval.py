"""Image-text retrieval, by two conventions that measure different things.

Grouped: an image finds its text if any of its captions comes first; identical caption texts are one
candidate, which belongs to all their images. Paired: row i of the (image, caption) pairs must find row i, as
OpenCLIP's training evaluation counts: the other captions and the copies of an image are wrong, so that with
five captions an image a perfect model has R@1 of about 0.2.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    numbers: dict[str, int] = {}  # of the distinct captions, in order of first appearance
    pairs = [
        (row, numbers.setdefault(text, len(numbers)))
        for row, position in enumerate(present.tolist())
        for text in by_position.get(position, ())
    ]
    if not pairs:
        raise UserError(f"evaluate.retrieval: no image in {images.folder} has a caption.")
    of_image, of_text = np.array(pairs, np.int64).T
    captioned, of_captioned = np.unique(of_image, return_inverse=True)
    own_row = Matches(np.arange(len(pairs)), np.arange(len(pairs)))
    image = known.features[present]
    text = encode_texts(model, list(numbers), context, tick)
    rows = [torch.from_numpy(side).to(image.device) for side in (captioned, of_image, of_text)]
    for name, queries, candidates, owners in (
        ("i2t", image[rows[0]], text, Matches(of_captioned, of_text)),
        ("t2i", text, image, Matches(of_text, of_image)),
        ("paired_i2t", image[rows[1]], text[rows[2]], own_row),
        ("paired_t2i", text[rows[2]], image[rows[1]], own_row),
    ):
        places = rank_together(queries, candidates, owners, context, tick)
        yield from ((f"{name}_{kind}", value) for kind, value in figures(places))
    yield "images", float(len(image))
    yield "pairs", float(len(pairs))
    yield "distinct_captions", float(len(numbers))
