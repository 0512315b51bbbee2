"""Sources for the sampler, with the sums that an index tells of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from clipcluster.data.sampling.caption_rounds import SamplerSource
from clipcluster.data.shards.metadata import CaptionField


def sampler_source(
    sample_counts: np.ndarray,
    captions: np.ndarray | None = None,
    weight: float | None = None,
    *,
    fields: Sequence[CaptionField] = (),
    more_than: np.ndarray | None = None,
    **options: Any,
) -> SamplerSource:
    """A source whose samples have these `captions` (n_samples,), or those of all `fields`."""
    if captions is not None:
        fields = (CaptionField("default", None, captions),)
    if fields and more_than is None:
        totals = np.sum([np.asarray(own.counts) for own in fields], axis=0, dtype=np.int64)
        shards = np.repeat(np.arange(len(sample_counts)), sample_counts)
        rounds = range(max(1, int(totals.max(initial=0))))
        more_than = np.array(
            [np.bincount(shards[totals > c], minlength=len(sample_counts)) for c in rounds], np.int32
        ).reshape(len(rounds), len(sample_counts))
    ends = np.cumsum(sample_counts, dtype=np.int64)
    return SamplerSource(sample_counts, ends, fields, more_than, weight, **options)


def captions_of(shape: SamplerSource) -> np.ndarray | None:
    """Captions of each sample of a source with one field, (n_samples,); None where they play no part."""
    return shape.fields[0].counts if shape.fields else None
