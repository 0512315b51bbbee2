"""The section `evaluate`: what is measured, and when. No torch."""

from __future__ import annotations

from clipcluster.recipe.sections.base import Section, key
from clipcluster.recipe.sections.values import Int
from clipcluster.recipe.units import Duration


class Evaluate(Section):
    """What is measured, and when."""

    every: Duration | None = key(
        "record", "How often, besides the end of the run. Default: only at the end.", None
    )
    retrieval: tuple[str, ...] = key(
        "record",
        "Shard folders for image-text retrieval; metrics are named by the last component of each.",
        (),
        path="path",
    )
    zero_shot: tuple[str, ...] = key(
        "record",
        "Shard folders for zero-shot classification (class names and templates beside the shards).",
        (),
        path="path",
    )
    classification: tuple[str, ...] = key(
        "record",
        "Shard folders for classification (task: classify); with train.ema the averaged weights are measured "
        "and, as raw_…, the raw ones.",
        (),
        path="path",
    )
    batch_size: Int = key("record", "Samples of one forward pass, over all ranks.", 256, ge=1)
