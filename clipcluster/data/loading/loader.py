"""Batches for one rank. The whole state is one integer: the number of the next batch."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from clipcluster.data.images.transforms import evaluation_transform, train_transform
from clipcluster.data.loading.batch import Batch, EvaluationBatch
from clipcluster.data.loading.shared_buffer import SHAREABLE, SharedBuffer
from clipcluster.data.loading.worker import EvaluationReader, PartialBatch, TrainReader, WorkItem
from clipcluster.data.loading.worker_pool import PREFETCH, WorkerPool
from clipcluster.data.sampling.oversampling import ShownClasses
from clipcluster.data.sampling.sampler import Draws
from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.tokenizer import Tokenizer


class BatchSampler(Protocol):
    """Which samples a batch holds, for any batch number."""

    batch_size: int

    def slots(self, t: int, start: int, stop: int) -> Draws: ...

    def shown_classes(self, source: int) -> ShownClasses: ...


class Loader:
    """Yields batches `start`, `start` + 1, … of `order` for ever, stepping over the `skipped` ranges.

    `data` is the recipe's data section. Rank r of W owns the contiguous r-th share of each batch's slots, its
    workers contiguous shares of that, so that batch t is the same for every number of ranks and workers.
    `skipped` are half-open (begin, end) ranges of batch numbers. A sample that cannot be decoded is replaced
    by the next good one of its shard (of a class that is shown) and reported once, in `Batch.bad`.

    `next` raises DataError (a shard changed or is gone, nothing of a shard can be decoded, an unexpected
    error at a sample), OSError (a disk that fails after retries), OutOfMemory and WorkerDied.
    """

    def __init__(
        self,
        sources: Sequence[Dataset],
        order: BatchSampler,
        data: Any,
        *,
        tokenizer: Tokenizer | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start: int = 0,
        skipped: Sequence[tuple[int, int]] = (),
        prefetch: int = PREFETCH,
    ) -> None:
        self._order = order
        self._slots = order.batch_size * rank // world_size, order.batch_size * (rank + 1) // world_size
        self._pieces = max(1, workers)
        self._skipped = [(begin, end) for begin, end in skipped]
        shown = [order.shown_classes(number) for number in range(len(sources))]
        transform = train_transform(data.image)
        self._image_shape = (3, transform.size, transform.size)
        self._rooms: deque[SharedBuffer] | None = (
            deque() if workers and SHAREABLE else None
        )  # batches in the making
        reader = TrainReader(sources, tokenizer, transform, seed, shown)
        self._stream = WorkerPool(reader, self._shares(start), workers, prefetch)
        self._reported: set[tuple[int, int]] = set()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        pieces = self._stream.take(self._pieces)
        bad = []
        for entry in (entry for piece in pieces for entry in piece.bad):
            sample = (entry["source"], entry["position"])
            if sample not in self._reported:
                self._reported.add(sample)
                bad.append(entry)
        classes = torch.tensor([number for piece in pieces for number in piece.classes], dtype=torch.int64)
        return Batch(
            index=pieces[0].index,
            images=self._images(pieces),
            tokens=_joined([piece.tokens for piece in pieces]),
            mask=_joined([piece.mask for piece in pieces]),
            classes=classes if (classes >= 0).any() else None,
            keys=[key for piece in pieces for key in piece.keys],
            bad=bad,
        )

    def _images(self, pieces: Sequence[PartialBatch]) -> torch.Tensor:
        if self._rooms is None:
            return _laid_together([piece.images for piece in pieces if piece.images is not None])
        room = self._rooms.popleft()
        room.close()  # every worker has written its part
        return room.images

    def close(self) -> None:
        """Ends the workers; may be called twice."""
        self._stream.close()
        while self._rooms:
            self._rooms.popleft().close()

    def _shares(self, start: int) -> Iterator[WorkItem]:
        t = start
        while True:
            ahead = [end for begin, end in self._skipped if begin <= t < end]
            if ahead:
                t = max(ahead)
                continue
            draws = self._order.slots(t, *self._slots)
            columns = (draws.source, draws.pass_index, draws.position, draws.caption)
            place = None
            if self._rooms is not None:
                self._rooms.append(SharedBuffer((len(draws), *self._image_shape)))
                place = self._rooms[-1].place
            share = WorkItem(t, self._slots[0], *columns, place)
            yield from share.cut(self._pieces)
            t += 1


class EvaluationLoader:
    """Every sample of a source once over all ranks, in order: ceil(n_samples / batch_size) batches.

    `batch_size` is global; every rank gets the same number of batches, the last of which may hold no sample
    for it. Raises what Loader raises; a sample that cannot be decoded is left out and reported.
    """

    def __init__(
        self,
        shards: Dataset,
        data: Any,
        tokenizer: Tokenizer | None,
        rank: int,
        world_size: int,
        batch_size: int,
        workers: int,
    ) -> None:
        self._samples, self._batch_size = shards.n_samples, batch_size
        self._rank, self._world_size = rank, world_size
        self._pieces = max(1, workers)
        reader = EvaluationReader(shards, tokenizer, evaluation_transform(data.image))
        self._stream = WorkerPool(reader, self._shares(), workers)

    def __len__(self) -> int:
        return -(-self._samples // self._batch_size)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        try:
            for _ in range(len(self)):
                yield self._join(self._stream.take(self._pieces))
        finally:
            self.close()

    def close(self) -> None:
        """Ends the workers; may be called twice."""
        self._stream.close()

    def _shares(self) -> Iterator[WorkItem]:
        for index in range(len(self)):
            begin = index * self._batch_size
            size = min(self._batch_size, self._samples - begin)
            first, end = size * self._rank // self._world_size, size * (self._rank + 1) // self._world_size
            positions = np.arange(begin + first, begin + end)
            nothing = np.zeros(len(positions), np.int64)
            share = WorkItem(
                index, first, nothing.astype(np.int32), nothing, positions, nothing.astype(np.int32)
            )
            yield from share.cut(self._pieces)

    def _join(self, pieces: list[PartialBatch]) -> EvaluationBatch:
        positions = [position for piece in pieces for position in piece.positions]
        captions = [texts for piece in pieces for texts in piece.captions]
        tokens = _joined([piece.tokens for piece in pieces])
        owners = [position for position, texts in zip(positions, captions, strict=True) for _ in texts]
        return EvaluationBatch(
            index=pieces[0].index,
            positions=torch.tensor(positions, dtype=torch.int64),
            images=_laid_together([piece.images for piece in pieces if piece.images is not None]),
            classes=torch.tensor([number for piece in pieces for number in piece.classes], dtype=torch.int64),
            captions=captions,
            tokens=tokens,
            mask=_joined([piece.mask for piece in pieces]),
            owners=None if tokens is None else torch.tensor(owners, dtype=torch.int64),
            keys=[key for piece in pieces for key in piece.keys],
            bad=[entry for piece in pieces for entry in piece.bad],
        )


def evaluation_batches(
    shards: Dataset,
    data: Any,
    tokenizer: Tokenizer | None,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 64,
    workers: int = 0,
) -> EvaluationLoader:
    """Every sample of `shards` once over the ranks, with its position and all its captions."""
    return EvaluationLoader(shards, data, tokenizer, rank, world_size, batch_size, workers)


def _joined(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return _laid_together(present) if present else None


def _laid_together(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
