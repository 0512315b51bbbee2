"""What a loader worker does with its share of a batch: read, decode, transform, tokenize."""

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from clipcluster.data.images.decode import BadImage, decode
from clipcluster.data.images.transforms import EvaluationTransform, TrainTransform, draw_seed
from clipcluster.data.loading.shared_buffer import BufferSlice
from clipcluster.data.sampling.oversampling import ShownClasses
from clipcluster.data.shards.dataset import Dataset, Sample
from clipcluster.data.tokenizer import Tokenizer
from clipcluster.runtime.stop import DataError, OutOfMemory


@dataclass(frozen=True)
class WorkItem:
    """The draws that one worker turns into samples: `first` is the slot of the first in the global batch.

    `place` is where their images go in memory that the rank shares; None: they are handed over.
    """

    index: int
    first: int
    source: np.ndarray
    pass_index: np.ndarray
    position: np.ndarray
    caption: np.ndarray
    place: BufferSlice | None = None

    def __len__(self) -> int:
        return len(self.position)

    def cut(self, pieces: int) -> Iterator["WorkItem"]:
        """Contiguous shares of this one, their sizes equal but for one."""
        for piece in range(pieces):
            begin, end = len(self) * piece // pieces, len(self) * (piece + 1) // pieces
            yield WorkItem(
                self.index,
                self.first + begin,
                self.source[begin:end],
                self.pass_index[begin:end],
                self.position[begin:end],
                self.caption[begin:end],
                None if self.place is None else self.place.cut(begin, end),
            )


@dataclass
class PartialBatch:
    """What a share became, in the order of its draws; for evaluation, tokens are of all captions.

    `images` is None where they were written into the share's place.
    """

    index: int
    images: torch.Tensor | None
    tokens: torch.Tensor | None
    mask: torch.Tensor | None
    classes: list[int]
    keys: list[tuple[int, str, str]]
    bad: list[dict[str, Any]]
    positions: list[int] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """Tokens travel in the message: for so few bytes, shared memory costs more than it saves."""
        state = dict(self.__dict__)
        for name in ("tokens", "mask"):
            state[name] = None if state[name] is None else state[name].numpy()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in ("tokens", "mask"):
            setattr(self, name, None if state[name] is None else torch.from_numpy(state[name]))


@dataclass(frozen=True)
class WorkerFailure:
    """An exception of a worker, as plain text that travels between processes."""

    kind: str  # data | disk | memory
    reason: str
    advice: str = ""
    errno: int | None = None

    def error(self) -> Exception:
        """The exception to raise in the rank."""
        if self.kind == "disk":
            return OSError(self.errno, self.reason)
        if self.kind == "memory":
            return OutOfMemory(self.reason, self.advice)
        return DataError(self.reason, self.advice)


class Reader:
    """Turns shares into pieces; an exception becomes a WorkerFailure that names shard and key."""

    def __init__(self, sources: Sequence[Dataset], tokenizer: Tokenizer | None, *, text: bool) -> None:
        self.text = text
        self.sources = list(sources)
        self.tokenizer = tokenizer
        self._bad: dict[tuple[int, int], dict[str, Any]] = {}
        self._at: tuple[int, int] | None = None

    def __getitems__(self, share: WorkItem) -> PartialBatch | WorkerFailure:
        """The piece of one share. torch's fetcher calls it with what the batch sampler yielded."""
        try:
            self._announce(share)
            return self.load(share)
        except DataError as error:
            return WorkerFailure("data", error.reason, error.advice)
        except MemoryError:
            return WorkerFailure(
                "memory",
                f"{self._where()}: no memory left in a loader worker",
                "fewer workers, or more memory",
            )
        except OSError as error:
            return WorkerFailure("disk", f"{self._where(key=False)}: {error}", errno=error.errno)
        except Exception as error:
            lines = "".join(traceback.format_exception(error)[-3:])
            return WorkerFailure("data", f"{self._where()}: {type(error).__name__}: {error}\n{lines}")

    def load(self, share: WorkItem) -> PartialBatch:
        raise NotImplementedError

    def _announce(self, share: WorkItem) -> None:
        self._at = None
        for number in np.unique(share.source):
            self.sources[number].announce(share.position[share.source == number].tolist())

    def _decoded(self, source: int, position: int) -> tuple[Sample | None, torch.Tensor | None]:
        """Sample and pixels, or nothing if it is bad; then `_bad` says why."""
        self._at = (source, position)
        if (source, position) in self._bad:
            return None, None
        sample = self.sources[source].read(position, text=self.text)
        try:
            return sample, decode(sample.image)
        except BadImage as error:
            self._bad[source, position] = {
                "shard": sample.shard,
                "key": sample.key,
                "reason": str(error),
                "source": source,
                "position": position,
            }
            return None, None

    def _where(self, *, key: bool = True) -> str:
        """Shard and key of the sample at hand, as far as they can be told; the key has to be read."""
        if self._at is None:
            return "before the first sample"
        shards = self.sources[self._at[0]]
        shard = shards.shard_location(shards.locate(self._at[1])[0])
        if not key:
            return f"{shard}, sample {self._at[1]}"
        try:
            return f"{shard}, key {shards.read(self._at[1], text=False).key}"
        except Exception:
            return f"{shard}, sample {self._at[1]}"


class TrainReader(Reader):
    """Samples for training: augmented by the draw's own seed, a bad one replaced.

    `shown`: for each source the classes that may replace a bad sample; none: all may.
    """

    def __init__(
        self,
        sources: Sequence[Dataset],
        tokenizer: Tokenizer | None,
        transform: TrainTransform,
        seed: int,
        shown: Sequence[ShownClasses] = (),
    ) -> None:
        super().__init__(sources, tokenizer, text=tokenizer is not None)
        self.transform = transform
        self.seed = seed
        self._shown = list(shown) or [ShownClasses()] * len(sources)

    def _empty(self, count: int) -> torch.Tensor:
        return torch.empty((count, 3, self.transform.size, self.transform.size), dtype=torch.uint8)

    def load(self, share: WorkItem) -> PartialBatch:
        images = self._empty(len(share)) if share.place is None else share.place.open()
        texts: list[str] = []
        classes: list[int] = []
        keys: list[tuple[int, str, str]] = []
        bad: list[dict[str, Any]] = []
        columns = (share.source, share.pass_index, share.position, share.caption)
        for at, draw in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            source, pass_index, position, caption = draw
            sample, pixels = self._good(source, position, bad)
            images[at] = self.transform(pixels, draw_seed(self.seed, source, pass_index, position, caption))
            texts.append(sample.captions[max(caption, 0) % len(sample.captions)] if sample.captions else "")
            classes.append(sample.cls)
            keys.append((share.first + at, sample.shard, sample.key))
        tokens, mask = self.tokenizer(texts) if self.tokenizer else (None, None)
        return PartialBatch(
            share.index, images if share.place is None else None, tokens, mask, classes, keys, bad
        )

    def _good(self, source: int, position: int, bad: list[dict[str, Any]]) -> tuple[Sample, torch.Tensor]:
        """The sample at `position`, or the next good one of its shard, cyclically."""
        shards = self.sources[source]
        shard, row = shards.locate(position)
        count, first = int(shards.sample_counts[shard]), position - row
        for step in range(count):
            candidate = first + (row + step) % count
            if step and self.tokenizer is not None and not shards.caption_counts[candidate]:
                continue
            if step and shards.classes[candidate] not in self._shown[source]:
                continue
            sample, pixels = self._decoded(source, candidate)
            if sample is not None and pixels is not None:
                return sample, pixels
            bad.append(self._bad[source, candidate])
        raise DataError(
            f"no sample of shard {shards.shard_location(shard)} can be decoded: {bad[-1]['reason']}",
            f"look at its images: clipcluster shards verify {shards.shard_location(shard).parent}",
        )


class EvaluationReader(Reader):
    """Samples for evaluation: the centre square, all captions; a bad one is left out."""

    def __init__(self, shards: Dataset, tokenizer: Tokenizer | None, transform: EvaluationTransform) -> None:
        super().__init__([shards], tokenizer, text=True)
        self.transform = transform

    def load(self, share: WorkItem) -> PartialBatch:
        images: list[torch.Tensor] = []
        piece = PartialBatch(share.index, torch.empty(0), None, None, [], [], [])
        for at, position in enumerate(share.position.tolist()):
            sample, pixels = self._decoded(0, position)
            if sample is None or pixels is None:
                piece.bad.append(self._bad[0, position])
                continue
            images.append(self.transform(pixels))
            piece.classes.append(sample.cls)
            piece.keys.append((share.first + at, sample.shard, sample.key))
            piece.positions.append(position)
            piece.captions.append(sample.captions)
        size = self.transform.size
        piece.images = torch.stack(images) if images else torch.empty((0, 3, size, size), dtype=torch.uint8)
        if self.tokenizer is not None:
            piece.tokens, piece.mask = self.tokenizer([text for texts in piece.captions for text in texts])
        return piece
