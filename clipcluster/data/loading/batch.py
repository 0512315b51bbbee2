"""A batch as the loader yields it: one rank's part."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

COLUMNS = ("images", "tokens", "mask", "classes")  # of a Batch: tensors with one row a sample, or None


@dataclass(frozen=True)
class Batch:
    """One rank's part of batch `index`, b samples.

    `images` (b, 3, S, S) uint8; `tokens` (b, L) int64 and `mask` (b, L) bool, or None without a tokenizer;
    `classes` (b,) int64 with -1 for none, or None if no sample has one. `keys` are (slot of the global batch,
    shard, key) of each sample; `bad` the samples that could not be decoded, each with `shard`, `key` and
    `reason`, reported once by a loader. `extras`: further members by name, b values each: a tensor (b, ...)
    where the samples' values have one shape, else a list.
    """

    index: int
    images: torch.Tensor
    tokens: torch.Tensor | None
    mask: torch.Tensor | None
    classes: torch.Tensor | None
    keys: list[tuple[int, str, str]]
    bad: list[dict[str, Any]] = field(default_factory=list)
    extras: dict[str, torch.Tensor | list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def tensor(self, name: str) -> torch.Tensor:
        """An extra that is a tensor, (b, ...). KeyError where there is none; TypeError where it is a list."""
        values = self.extras[name]
        if not isinstance(values, torch.Tensor):
            raise TypeError(f"{name} is a list")
        return values

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors, those of `extras` included, on a device; pixels stay uint8."""

        def moved(values: Any) -> Any:
            return values.to(device, non_blocking=True) if isinstance(values, torch.Tensor) else values

        return self._with(moved)

    def cut(self, start: int, stop: int) -> "Batch":
        """Samples `start` to `stop` of this batch: views of its tensors. `bad` stays with the uncut batch.

        Raises ValueError unless 0 <= start <= stop <= len(self).
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"no samples {start} to {stop} in a batch of {len(self)}")
        rows = slice(start, stop)
        return self._with(lambda v: None if v is None else v[rows], keys=self.keys[rows], bad=[])

    def _with(self, change: Callable[[Any], Any], **others: Any) -> "Batch":
        """This batch with each of its columns and extras changed."""
        columns: dict[str, Any] = {name: change(getattr(self, name)) for name in COLUMNS}
        extras = {name: change(values) for name, values in self.extras.items()}
        return replace(self, extras=extras, **columns, **others)

    def micro_batches(self, count: int) -> Iterator["Batch"]:
        """The batch as `count` consecutive micro-batches of equal size, as views.

        Raises ValueError where `count` does not divide the batch.
        """
        if count < 1 or len(self) % count:
            raise ValueError(f"a batch of {len(self)} cannot be cut into {count} equal micro-batches")
        size = len(self) // count
        for number in range(count):
            yield self.cut(number * size, (number + 1) * size)


@dataclass(frozen=True)
class EvaluationBatch:
    """One rank's part of an evaluation batch: b samples, with all their captions.

    `positions` (b,) int64: which sample of the source; `keys`: b pairs (shard, key); `images` (b, 3, S, S)
    uint8; `classes` (b,) int64, -1 for none; `captions`: b lists. A sample that cannot be decoded is left out
    and is listed in `bad`.
    """

    positions: torch.Tensor
    images: torch.Tensor
    classes: torch.Tensor
    captions: list[list[str]]
    keys: list[tuple[str, str]]
    bad: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)


def normalise(
    images: torch.Tensor, mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """(B, 3, H, W) uint8 to float: (pixel / 255 - mean) / std for each colour, on the images' device.

    float32, or the dtype of `mean` and `std` where they are tensors.
    """
    centre, width = (
        torch.as_tensor(values, device=images.device).view(1, 3, 1, 1) * 255 for values in (mean, std)
    )
    return (images.to(width.dtype) - centre) / width
