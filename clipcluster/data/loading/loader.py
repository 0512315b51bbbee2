"""The loader: batches for one rank, whose whole state is the number of the next batch."""

import itertools
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from clipcluster.data.images.transforms import evaluation_transform, train_transform
from clipcluster.data.loading.batch import Batch, EvaluationBatch
from clipcluster.data.loading.extras import concatenated, decoders_of
from clipcluster.data.loading.preparation import Preparation
from clipcluster.data.loading.shared_buffer import SHAREABLE, SharedBuffer
from clipcluster.data.loading.worker import EvaluationReader, PartialBatch, TrainReader, WorkItem
from clipcluster.data.loading.worker_pool import PREFETCH, WorkerPool
from clipcluster.data.sampling.sampler import DRAW, Draws, Sampler
from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.tokenizer import Tokenizer
from clipcluster.runtime.world import World


class Loader:
    """Yields batches `start`, `start` + 1, … of `sampler` without end, leaving out the `skipped` ranges.

    Rank r of W owns the contiguous r-th part of each batch's slots, and its workers contiguous parts of that,
    so that batch t is the same for every number of ranks and workers. A sample that cannot be decoded, or
    lacks a member, is replaced by the next good one of its shard (of a class that is shown) and reported
    once, in `Batch.bad`.

    Args:
        data: the recipe's section `data`.
        skipped: half-open (begin, end) ranges of batch numbers.
        extras: further members of every sample: name -> dotted name of the decoder (`extras.py`).
        preparation: makes a sample's row of the batch; default: a random crop, the caption drawn, all extras.
        prefetch: batches that each worker prepares ahead.

    `next` raises DataError (a shard changed or is gone, nothing of a shard can be decoded, the values of an
    extra cannot be stacked, an unexpected error at a sample), OSError (a disk that fails after retries),
    OutOfMemory and WorkerDied.
    """

    def __init__(
        self,
        sources: Sequence[Dataset],
        sampler: Sampler,
        data: Any,
        *,
        tokenizer: Tokenizer | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start: int = 0,
        skipped: Sequence[tuple[int, int]] = (),
        extras: Mapping[str, str] | None = None,
        preparation: Preparation | None = None,
        prefetch: int = PREFETCH,
    ) -> None:
        self._sampler = sampler
        size = sampler.batch_size
        self._slots = size * rank // world_size, size * (rank + 1) // world_size
        self._items_per_batch = max(1, workers)
        self._skipped = skipped
        shown = [sampler.shown_classes(number) for number in range(len(sources))]
        preparation = preparation or Preparation(train_transform(data.image))
        self._image_shape = (3, preparation.transform.size, preparation.transform.size)
        self._shared = bool(workers) and SHAREABLE
        self._buffers: deque[SharedBuffer] = deque()  # of the batches that workers are preparing
        reader = TrainReader(sources, tokenizer, preparation, seed, shown, decoders_of(extras or {}))
        self._pool = WorkerPool(reader, self._items(start), workers, prefetch)
        self._reported: set[tuple[int, int]] = set()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        parts = self._pool.take(self._items_per_batch)
        bad = {(entry["source"], entry["position"]): entry for part in parts for entry in part.bad}
        unreported = [entry for sample, entry in bad.items() if sample not in self._reported]
        self._reported.update(bad)
        classes = torch.tensor([number for part in parts for number in part.classes], dtype=torch.int64)
        return Batch(
            index=parts[0].index,
            images=self._taken_buffer() if self._shared else _concatenated([part.images for part in parts]),
            tokens=_concatenated([part.tokens for part in parts]),
            mask=_concatenated([part.mask for part in parts]),
            classes=classes if (classes >= 0).any() else None,
            keys=[key for part in parts for key in part.keys],
            bad=unreported,
            extras=self._joined_extras([part for part in parts if part.keys]),
        )

    def _taken_buffer(self) -> torch.Tensor:
        """The images of the next batch, of which every worker has written its slice."""
        buffer = self._buffers.popleft()
        buffer.close()
        return buffer.images

    def _joined_extras(self, parts: Sequence[PartialBatch]) -> dict[str, torch.Tensor | list[Any]]:
        samples = [f"{part.keys[0][1]}, key {part.keys[0][2]}" for part in parts]
        return {
            name: concatenated(name, [part.extras[name] for part in parts], samples)
            for name in parts[0].extras
        }

    def close(self) -> None:
        """Ends the workers; may be called twice."""
        self._pool.close()
        while self._buffers:
            self._buffers.popleft().close()

    def _items(self, start: int) -> Iterator[WorkItem]:
        for t in itertools.count(start):
            if any(begin <= t < end for begin, end in self._skipped):
                continue
            draws = self._sampler.slots(t, *self._slots)
            images = None
            if self._shared:
                self._buffers.append(SharedBuffer((len(draws), *self._image_shape)))
                images = self._buffers[-1].whole
            yield from WorkItem(t, self._slots[0], draws, images).cut(self._items_per_batch)


def evaluation_batches(
    dataset: Dataset, data: Any, *, world: World, batch_size: int = 64, workers: int = 0
) -> Generator[EvaluationBatch, None, None]:
    """Every sample of a dataset once over all ranks, in order: ceil(n_samples / batch_size) batches.

    `batch_size` is global; every rank gets the same number of batches, the last of which may hold no sample
    for it. Each batch tells the samples' positions, shards and keys, and has all their captions. Raises what
    Loader raises; a sample that cannot be decoded is left out and reported. `close` ends the workers.
    """
    begins, items_per_batch = range(0, dataset.n_samples, batch_size), max(1, workers)

    def items() -> Iterator[WorkItem]:
        for index, begin in enumerate(begins):
            size = min(batch_size, dataset.n_samples - begin)
            first, end = size * world.rank // world.size, size * (world.rank + 1) // world.size
            draws = np.zeros(end - first, DRAW).view(Draws)
            draws.position = np.arange(begin + first, begin + end)
            yield from WorkItem(index, first, draws).cut(items_per_batch)

    pool = WorkerPool(EvaluationReader(dataset, evaluation_transform(data.image)), items(), workers)
    try:
        for _ in begins:
            parts = pool.take(items_per_batch)
            keys = [key for part in parts for key in part.keys]
            yield EvaluationBatch(
                positions=torch.tensor([position for position, _, _ in keys], dtype=torch.int64),
                images=_concatenated([part.images for part in parts]),
                classes=torch.tensor([c for part in parts for c in part.classes], dtype=torch.int64),
                captions=[texts for part in parts for texts in part.captions],
                keys=[(shard, key) for _, shard, key in keys],
                bad=[entry for part in parts for entry in part.bad],
            )
    finally:
        pool.close()


def _concatenated(tensors: Sequence[torch.Tensor | None]) -> Any:
    """The tensors as one; None where there are none."""
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) > 1:
        return torch.cat(present)
    return present[0] if present else None
