"""Features of a whole set, computed by all ranks together and known to each of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipcluster.data.loading.batch import normalise
from clipcluster.model.protocols import DualEncoder, ImageEncoder
from clipcluster.runtime.world import World

if TYPE_CHECKING:
    from clipcluster.data.loading.batch import EvaluationBatch

logger = logging.getLogger("clipcluster")
_BAD = ("key", "shard", "reason")
EXAMPLES = 24
"""Entries of one list of details at most."""

Tick = Callable[[], None]
"""Called between batches on all ranks equally often: there they agree, and raise when they are to stop."""


@dataclass(frozen=True)
class EvaluationSet:
    """A folder of shards to evaluate on, and for a probe the one that it trains on.

    `batches()` gives this rank's part of the `samples`, in equally many batches on every rank, some of them
    empty. An image that cannot be decoded is absent from them.
    """

    name: str
    folder: str
    samples: int
    batches: Callable[[], Generator[EvaluationBatch, None, None]]
    classnames: Sequence[str] | None = None
    templates: Sequence[str] | None = None
    train: EvaluationSet | None = None


@dataclass(frozen=True)
class Measured:
    """What an evaluation found: figures by name, and what stands behind them, as JSON of bounded size."""

    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What every evaluation works with.

    tokenizer: list of B captions -> tokens (B, L) int64, mask (B, L) bool; None for a task without captions.
    mean, std: of the pixels in 0..1. batch_size: captions that this rank encodes at once.
    """

    world: World
    tokenizer: Callable[[list[str]], tuple[Tensor, Tensor]] | None
    mean: Sequence[float]
    std: Sequence[float]
    batch_size: int


@dataclass
class ImageFeatures:
    """Features (n, E) and which are `present` (n,), of all ranks.

    captions, classes, keys (shard and key): by position, of the images that this rank encoded.
    """

    features: Tensor
    present: Tensor
    captions: dict[int, list[str]] = field(default_factory=dict)
    classes: dict[int, int] = field(default_factory=dict)
    keys: dict[int, tuple[str, str]] = field(default_factory=dict)


def encode_images(model: ImageEncoder, images: EvaluationSet, context: Context, tick: Tick) -> ImageFeatures:
    """Every rank encodes its part; `features` and `present` are then those of all. Collective."""
    world = context.world
    features = torch.zeros(images.samples, model.embed_dim, device=world.device)
    known = ImageFeatures(features, torch.zeros(images.samples, device=world.device))
    for batch, pixels in evaluation_pixels(images, context, tick):
        rows = batch.positions.to(world.device)
        known.features[rows] = model.encode_image(pixels).to(known.features.dtype)
        known.present[rows] = 1
        positions = batch.positions.tolist()
        known.captions.update(zip(positions, batch.captions, strict=True))
        known.classes.update(zip(positions, batch.classes.tolist(), strict=True))
        known.keys.update(zip(positions, batch.keys, strict=True))
    # Rows of other ranks are zero here: the sum is their union, exact for any number of ranks.
    world.all_reduce_sum(known.features)
    known.present = world.all_reduce_sum(known.present) > 0
    return known


def evaluation_pixels(
    images: EvaluationSet, context: Context, tick: Tick
) -> Iterator[tuple[EvaluationBatch, Tensor]]:
    """This rank's batches that hold samples, with their pixels (b, 3, S, S) normalised, on the device.

    `tick` follows every batch; bad samples are logged.
    """
    device = context.world.device
    mean, std = (torch.tensor(tuple(values), device=device) for values in (context.mean, context.std))
    with closing(images.batches()) as batches:
        for batch in batches:
            for sample in batch.bad:
                logger.warning("%s: skipping %s in %s: %s", images.name, *map(sample.get, _BAD))
            if len(batch):
                yield batch, normalise(batch.images.to(device, non_blocking=True), mean, std)
            tick()


def encode_texts(model: DualEncoder, texts: Sequence[str], context: Context, tick: Tick) -> Tensor:
    """Features of all texts on every rank, (n, E) float32; each rank encodes an equal part. Collective."""
    assert context.tokenizer is not None, "tasks with captions have a tokenizer"
    world, size = context.world, context.batch_size
    features = torch.zeros(len(texts), model.embed_dim, device=world.device)
    for start, stop in rank_chunks(len(texts), world, size):
        if start < stop:
            tokens, mask = context.tokenizer(list(texts[start:stop]))
            encoded = model.encode_text(tokens.to(world.device), mask.to(world.device))
            features[start:stop] = encoded.to(features.dtype)
        tick()
    return world.all_reduce_sum(features)


def rank_chunks(count: int, world: World, rows: int) -> Iterator[tuple[int, int]]:
    """This rank's contiguous part of `count` rows, in chunks of at most `rows`: equally many on every rank.

    The last chunks may be empty.
    """
    start, stop = count * world.rank // world.size, count * (world.rank + 1) // world.size
    largest = -(-count // world.size)
    for chunk in range(0, largest, rows):
        yield min(start + chunk, stop), min(start + chunk + rows, stop)


def from_all_ranks(own: dict[int, Any], world: World) -> dict[int, Any]:
    """The entries of all ranks by rising key. Collective."""
    merged: dict[int, Any] = {}
    for entries in world.gather(list(own.items())):
        merged.update(entries)
    return dict(sorted(merged.items()))
