"""What a loader worker does with a work item: read, decode, transform, tokenize."""

import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from clipcluster.data.images.decode import BadImage, decode
from clipcluster.data.images.transforms import EvaluationTransform, TrainTransform, draw_seed
from clipcluster.data.loading.extras import BadExtra, Decoder, decode_extras, stacked
from clipcluster.data.loading.messages import PartialBatch, WorkItem
from clipcluster.data.sampling.oversampling import ShownClasses
from clipcluster.data.shards.dataset import Dataset, Sample
from clipcluster.data.tokenizer import Tokenizer
from clipcluster.runtime.outcome import DataError, OutOfMemory


class Decoded(NamedTuple):
    """A sample that could be decoded: `pixels` (3, H, W) uint8, `extras` the values of further members."""

    sample: Sample
    pixels: torch.Tensor
    extras: dict[str, Any]


class Reader:
    """Turns work items into partial batches; an unexpected error names shard and key."""

    def __init__(
        self,
        sources: Sequence[Dataset],
        tokenizer: Tokenizer | None,
        *,
        text: bool,
        decoders: Mapping[str, Decoder] | None = None,
    ) -> None:
        self.text = text
        self.sources = list(sources)
        self.tokenizer = tokenizer
        self.decoders = dict(decoders or {})
        self._bad: dict[tuple[int, int], dict[str, Any]] = {}
        self._at: tuple[int, int] | None = None

    def __getitems__(self, item: WorkItem) -> PartialBatch | Exception:
        """The partial batch of one work item, or the error to raise in the rank; torch's fetcher calls it."""
        try:
            self._announce(item)
            return self.load(item)
        except DataError as error:
            return error
        except MemoryError:
            reason = f"{self._where()}: no memory left in a loader worker"
            return OutOfMemory(reason, "fewer workers, or more memory")
        except OSError as error:
            return OSError(error.errno, f"{self._where(key=False)}: {error}")
        except Exception as error:
            lines = "".join(traceback.format_exception(error)[-3:])
            return DataError(f"{self._where()}: {type(error).__name__}: {error}\n{lines}")

    def load(self, item: WorkItem) -> PartialBatch:
        raise NotImplementedError

    def _announce(self, item: WorkItem) -> None:
        self._at = None
        for number in np.unique(item.source):
            positions = item.position[item.source == number].tolist()
            self.sources[number].announce(positions, members=bool(self.decoders))

    def _decoded(self, source: int, position: int) -> Decoded | None:
        """The sample at a position, or None if it is bad; then `_bad` says why."""
        self._at = (source, position)
        if (source, position) in self._bad:
            return None
        dataset = self.sources[source]
        sample = dataset.read(position, text=self.text)
        try:
            pixels = decode(sample.image)
            if not self.decoders:
                return Decoded(sample, pixels, {})
            members = dataset.read_members(position, self.decoders)
            return Decoded(sample, pixels, decode_extras(self.decoders, members))
        except (BadImage, BadExtra) as error:
            self._bad[source, position] = {
                "shard": sample.shard,
                "key": sample.key,
                "reason": str(error),
                "source": source,
                "position": position,
            }
            return None

    def _where(self, *, key: bool = True) -> str:
        """Shard and key of the sample at hand, as far as they can be told; the key has to be read."""
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
    """Samples for training: augmented by the draw's own seed, a bad one replaced.

    `shown`: for each source the classes that may replace a bad sample; none: all may. `decoders`: the
    further members wanted, by extension.
    """

    def __init__(
        self,
        sources: Sequence[Dataset],
        tokenizer: Tokenizer | None,
        transform: TrainTransform,
        seed: int,
        shown: Sequence[ShownClasses] = (),
        decoders: Mapping[str, Decoder] | None = None,
    ) -> None:
        super().__init__(sources, tokenizer, text=tokenizer is not None, decoders=decoders)
        self.transform = transform
        self.seed = seed
        self._shown = list(shown) or [ShownClasses()] * len(sources)

    def load(self, item: WorkItem) -> PartialBatch:
        shape = (len(item), 3, self.transform.size, self.transform.size)
        images = torch.empty(shape, dtype=torch.uint8) if item.images is None else item.images.open()
        texts: list[str] = []
        extras: list[dict[str, Any]] = []
        part = PartialBatch(item.index, images if item.images is None else None, None, None, [], [], [])
        columns = (item.source, item.pass_index, item.position, item.caption)
        for at, draw in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            source, pass_index, position, caption = draw
            sample, pixels, values = self._good(source, position, part.bad)
            images[at] = self.transform(pixels, draw_seed(self.seed, source, pass_index, position, caption))
            texts.append(sample.captions[max(caption, 0) % len(sample.captions)] if sample.captions else "")
            extras.append(values)
            part.classes.append(sample.cls)
            part.keys.append((item.first + at, sample.shard, sample.key))
        if self.tokenizer is not None:
            part.tokens, part.mask = self.tokenizer(texts)
        names = [f"{shard}, key {key}" for _, shard, key in part.keys] if self.decoders else []
        for extension in self.decoders:
            part.extras[extension] = stacked(extension, [values[extension] for values in extras], names)
        return part

    def _good(self, source: int, position: int, bad: list[dict[str, Any]]) -> Decoded:
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
            decoded = self._decoded(source, candidate)
            if decoded is not None:
                return decoded
            bad.append(self._bad[source, candidate])
        location = dataset.shard_location(shard)
        raise DataError(
            f"no sample of shard {location} can be decoded: {bad[-1]['reason']}",
            f"look at its samples: clipcluster shards verify {location.parent}",
        )


class EvaluationReader(Reader):
    """Samples for evaluation: the centre square, all captions; a bad one is left out."""

    def __init__(self, dataset: Dataset, transform: EvaluationTransform) -> None:
        super().__init__([dataset], None, text=True)
        self.transform = transform

    def load(self, item: WorkItem) -> PartialBatch:
        images: list[torch.Tensor] = []
        part = PartialBatch(item.index, torch.empty(0), None, None, [], [], [])
        for position in item.position.tolist():
            decoded = self._decoded(0, position)
            if decoded is None:
                part.bad.append(self._bad[0, position])
                continue
            images.append(self.transform(decoded.pixels))
            part.classes.append(decoded.sample.cls)
            part.positions.append(position)
            part.captions.append(decoded.sample.captions)
        size = self.transform.size
        part.images = torch.stack(images) if images else torch.empty((0, 3, size, size), dtype=torch.uint8)
        return part
