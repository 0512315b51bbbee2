"""A loader worker: from a work item, by read, decode, transform and tokenize, to a partial batch."""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor

from clipcluster.data.images.decode import BadImage, decode
from clipcluster.data.images.transforms import EvaluationTransform, draw_seed
from clipcluster.data.loading.extras import BadExtra, Decoder, decode_extras, stacked
from clipcluster.data.loading.preparation import Drawn, Preparation
from clipcluster.data.loading.shared_buffer import BufferSlice
from clipcluster.data.sampling.oversampling import ShownClasses
from clipcluster.data.shards.dataset import Dataset, Sample
from clipcluster.data.tokenizer import Tokenizer
from clipcluster.runtime.outcome import DataError, OutOfMemory, is_out_of_memory

_SMALL = 1 << 20  # bytes


@dataclass(frozen=True)
class WorkItem:
    """The `Draws` of batch `index` that one worker turns into samples.

    first: the slot of the first draw in the global batch. images: where the pixels are written; None: they
    are sent back in the partial batch.
    """

    index: int
    first: int
    draws: np.recarray
    images: BufferSlice | None = None

    def cut(self, count: int) -> Iterator["WorkItem"]:
        """Divide it into `count` contiguous work items, whose sizes differ by one at most."""
        for number in range(count):
            begin, end = len(self.draws) * number // count, len(self.draws) * (number + 1) // count
            images = None if self.images is None else self.images.cut(begin, end)
            yield WorkItem(self.index, self.first + begin, self.draws[begin:end].view(np.recarray), images)


@dataclass
class PartialBatch:
    """The samples of one work item, in the order of its draws.

    `images` is None where they were written into a shared buffer. `keys` begin with the slot of the global
    batch, for evaluation with the position in the source. `captions` are left empty for training; `tokens`,
    `mask` and `extras` for evaluation.
    """

    index: int
    images: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    classes: list[int] = field(default_factory=list)
    keys: list[tuple[int, str, str]] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)
    extras: dict[str, torch.Tensor | list[Any]] = field(default_factory=dict)
    captions: list[list[str]] = field(default_factory=list)


def reduced(tensor: torch.Tensor) -> Any:
    """How a worker pickles a tensor: as bytes; only large pixels go through /dev/shm, which may be small."""
    if tensor.nbytes > _SMALL and tensor.dtype == torch.uint8:
        return reduce_tensor(tensor)
    return _rebuilt, (tensor.reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tensor.shape)


def _rebuilt(data: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    if not data.size:  # no bytes can be viewed as another type
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(data).view(dtype).view(shape)


class Reader:
    """Turns work items into partial batches; an unexpected error names shard and key.

    turned: whether images are turned by their EXIF orientation.
    """

    turned = True

    def __init__(
        self,
        sources: Sequence[Dataset],
        tokenizer: Tokenizer | None,
        decoders: Mapping[str, Decoder],
        *,
        text: bool,
    ) -> None:
        self.text = text
        self.sources = sources
        self.tokenizer = tokenizer
        self.decoders = decoders
        self._bad: dict[tuple[int, int], dict[str, Any]] = {}
        self._at: tuple[int, int] | None = None

    def __getitems__(self, item: WorkItem) -> PartialBatch | Exception:
        """The partial batch of one work item, or the error to raise in the rank; torch's fetcher calls it."""
        try:
            self._announce(item)
            return self.load(item)
        except DataError as error:
            return error
        except OSError as error:
            return OSError(error.errno, f"{self._where(key=False)}: {error}")
        except Exception as error:
            if is_out_of_memory(error):
                reason = f"{self._where()}: no memory left in a loader worker"
                return OutOfMemory(reason, "fewer workers, or more memory")
            lines = "".join(traceback.format_exception(error)[-3:])
            return DataError(f"{self._where()}: {type(error).__name__}: {error}\n{lines}")

    @property
    def modules(self) -> tuple[str, ...]:
        """Heavy imports, which the fork server makes once for all workers."""
        return tuple(getattr(self.tokenizer, "modules", ()))

    def load(self, item: WorkItem) -> PartialBatch:
        """The partial batch of a work item; raises whatever reading and decoding raise."""
        raise NotImplementedError

    def check(self, sample: Sample, pixels: torch.Tensor, values: Mapping[str, Any]) -> None:
        """BadExtra where a sample's members do not fit each other, or do not fit its pixels."""

    def _announce(self, item: WorkItem) -> None:
        self._at = None
        for number in np.unique(item.draws.source):
            positions = item.draws.position[item.draws.source == number].tolist()
            self.sources[number].announce(positions, members=bool(self.decoders))

    def _decoded(
        self, source: int, position: int, bad: list[dict[str, Any]]
    ) -> tuple[Sample, torch.Tensor, dict[str, Any]] | None:
        """A sample, its pixels (3, H, W) uint8 and extras; None, and an entry in `bad`, if it is bad."""
        self._at = (source, position)
        if self._at not in self._bad:
            dataset = self.sources[source]
            sample = dataset.read(position, text=self.text)
            try:
                pixels = decode(sample.image, turned=self.turned)
                members = dataset.read_members(position, self.decoders) if self.decoders else {}
                values = decode_extras(self.decoders, members)
                self.check(sample, pixels, values)
                return sample, pixels, values
            except (BadImage, BadExtra) as error:
                found = {"shard": sample.shard, "key": sample.key, "reason": str(error)}
                self._bad[self._at] = {**found, "source": source, "position": position}
        bad.append(self._bad[self._at])
        return None

    def _where(self, *, key: bool = True) -> str:
        """Shard and key of the current sample, as far as they are known; the key has to be read."""
        if self._at is None:
            return "before the first sample"
        dataset = self.sources[self._at[0]]
        shard = dataset.shard_location(dataset.locate(self._at[1])[0])
        if not key:
            return f"{shard}, sample {self._at[1]}"
        try:
            return f"{shard}, key {dataset.read(self._at[1], text=False).key}"
        except Exception:
            return f"{shard}, sample {self._at[1]}"


class TrainReader(Reader):
    """Samples for training: prepared with the draw's own seed; a bad one is replaced.

    shown: for each source, the classes of samples that may replace a bad one. decoders: of the further
    members that the task needs, by name.
    """

    def __init__(
        self,
        sources: Sequence[Dataset],
        tokenizer: Tokenizer | None,
        preparation: Preparation,
        seed: int,
        shown: Sequence[ShownClasses],
        decoders: Mapping[str, Decoder],
    ) -> None:
        super().__init__(sources, tokenizer, decoders, text=tokenizer is not None)
        self.prepare, self.turned = preparation, preparation.turned
        self.seed = seed
        self._shown = shown

    def check(self, sample: Sample, pixels: torch.Tensor, values: Mapping[str, Any]) -> None:
        self.prepare.check(sample, pixels, values)

    @property
    def modules(self) -> tuple[str, ...]:
        return (*super().modules, *self.prepare.modules)

    def load(self, item: WorkItem) -> PartialBatch:
        size = self.prepare.transform.size
        shape = (len(item.draws), 3, size, size)
        images = torch.empty(shape, dtype=torch.uint8) if item.images is None else item.images.open()
        part = PartialBatch(item.index, images if item.images is None else None)
        texts: list[str] = []
        extras: list[Mapping[str, Any]] = []
        for at, (source, pass_index, position, caption) in enumerate(item.draws.tolist()):
            sample, pixels, values = self._good(source, position, part.bad)
            chosen = max(caption, 0) % len(sample.captions) if sample.captions else None
            seed = draw_seed(self.seed, source, pass_index, position, caption)
            row = self.prepare(Drawn(sample, pixels, values, chosen, seed))
            images[at] = row.image
            texts.append(row.text)
            extras.append(row.extras)
            part.classes.append(sample.cls)
            part.keys.append((item.first + at, sample.shard, sample.key))
        if self.tokenizer is not None:
            part.tokens, part.mask = self.tokenizer(texts)
        names = extras[0] if extras else ()
        samples = [f"{shard}, key {key}" for _, shard, key in part.keys] if names else []
        for name in names:
            part.extras[name] = stacked(name, [values[name] for values in extras], samples)
        return part

    def _good(
        self, source: int, position: int, bad: list[dict[str, Any]]
    ) -> tuple[Sample, torch.Tensor, dict[str, Any]]:
        """The sample at `position`, or the next good one of its shard, cyclically."""
        dataset = self.sources[source]
        shard, row = dataset.locate(position)
        count, first = int(dataset.sample_counts[shard]), position - row
        for step in range(count):
            candidate = first + (row + step) % count
            if step and self.tokenizer is not None and not dataset.caption_counts(candidate):
                continue
            if step and dataset.classes[candidate] not in self._shown[source]:
                continue
            decoded = self._decoded(source, candidate, bad)
            if decoded is not None:
                return decoded
        raise DataError(
            f"no sample of shard {dataset.shard_location(shard)} can be decoded: {bad[-1]['reason']}",
            f"look at its samples: clipcluster shards verify {dataset.folder_of(shard).folder}",
        )


class EvaluationReader(Reader):
    """Samples for evaluation: the centre square and all captions; a bad one is left out."""

    def __init__(self, dataset: Dataset, transform: EvaluationTransform) -> None:
        super().__init__([dataset], None, {}, text=True)
        self.transform = transform

    def load(self, item: WorkItem) -> PartialBatch:
        images: list[torch.Tensor] = []
        part = PartialBatch(item.index)
        for position in item.draws.position.tolist():
            decoded = self._decoded(0, position, part.bad)
            if decoded is not None:
                sample, pixels, _ = decoded
                images.append(self.transform(pixels))
                part.classes.append(sample.cls)
                part.keys.append((position, sample.shard, sample.key))
                part.captions.append(sample.captions)
        size = self.transform.size
        part.images = torch.stack(images) if images else torch.empty((0, 3, size, size), dtype=torch.uint8)
        return part
