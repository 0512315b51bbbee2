"""What the loader hands over: one rank's share of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Batch:
    """One rank's share of batch `index`, b samples.

    `images` (b, 3, S, S) uint8; `tokens` (b, L) int64 and `mask` (b, L) bool, or None without a tokenizer;
    `classes` (b,) int64 with -1 for none, or None if no sample has one. `keys` are (slot of the global batch,
    shard, key) of what was used; `bad` the samples that could not be decoded, each with `shard`, `key` and
    `reason`, reported once by a loader.
    """

    index: int
    images: torch.Tensor
    tokens: torch.Tensor | None
    mask: torch.Tensor | None
    classes: torch.Tensor | None
    keys: list[tuple[int, str, str]]
    bad: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on a device; pixels stay uint8."""
        return replace(self, **_moved(self, ("images", "tokens", "mask", "classes"), device))


@dataclass(frozen=True)
class EvaluationBatch:
    """One rank's share of an evaluation batch: b samples, with all their captions, c in total.

    `positions` (b,) int64: which sample of the source; `images` (b, 3, S, S) uint8; `classes` (b,) int64, -1
    for none; `captions`: b lists; `tokens` (c, L), `mask` (c, L) and `owners` (c,) int64, the position of
    each caption's image: captions laid end to end (None without a tokenizer). A sample that cannot be decoded
    is left out and stands in `bad`.
    """

    index: int
    positions: torch.Tensor
    images: torch.Tensor
    classes: torch.Tensor
    captions: list[list[str]]
    tokens: torch.Tensor | None
    mask: torch.Tensor | None
    owners: torch.Tensor | None
    keys: list[tuple[int, str, str]]
    bad: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "EvaluationBatch":
        """The same batch with its tensors on a device; pixels stay uint8."""
        names = ("positions", "images", "classes", "tokens", "mask", "owners")
        return replace(self, **_moved(self, names, device))


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


def _moved(batch: Any, names: Sequence[str], device: torch.device | str) -> dict[str, Any]:
    tensors = {name: getattr(batch, name) for name in names}
    return {name: t.to(device, non_blocking=True) for name, t in tensors.items() if t is not None}
