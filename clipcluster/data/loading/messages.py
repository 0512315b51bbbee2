"""What travels between a rank and its loader workers: work items there, partial batches (or errors) back."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from clipcluster.data.loading.shared_buffer import BufferSlice

_COLUMNS = ("source", "pass_index", "position", "caption")  # of a WorkItem: one value a draw


@dataclass(frozen=True)
class WorkItem:
    """The draws that one worker turns into samples: `first` is the slot of the first in the global batch.

    `images` is where the pixels are written; None: they are sent back in the partial batch.
    """

    index: int
    first: int
    source: np.ndarray
    pass_index: np.ndarray
    position: np.ndarray
    caption: np.ndarray
    images: BufferSlice | None = None

    def __len__(self) -> int:
        return len(self.position)

    def cut(self, count: int) -> Iterator["WorkItem"]:
        """`count` contiguous work items, whose sizes differ by one at most."""
        for number in range(count):
            begin, end = len(self) * number // count, len(self) * (number + 1) // count
            columns = {name: getattr(self, name)[begin:end] for name in _COLUMNS}
            images = None if self.images is None else self.images.cut(begin, end)
            yield replace(self, first=self.first + begin, images=images, **columns)


@dataclass
class PartialBatch:
    """The samples of one work item, in the order of its draws.

    `images` is None where they were written into a shared buffer. `positions` and `captions` are left empty
    for training; `tokens`, `mask`, `keys` and `extras` for evaluation.
    """

    index: int
    images: torch.Tensor | None
    tokens: torch.Tensor | None
    mask: torch.Tensor | None
    classes: list[int]
    keys: list[tuple[int, str, str]]
    bad: list[dict[str, Any]]
    extras: dict[str, torch.Tensor | list[Any]] = field(default_factory=dict)
    positions: list[int] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """Small tensors travel as bytes in the message: shared memory would cost more than it saves."""
        return {
            **self.__dict__,
            "tokens": _packed(self.tokens),
            "mask": _packed(self.mask),
            "extras": {name: _packed(values) for name, values in self.extras.items()},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tokens, self.mask = _unpacked(self.tokens), _unpacked(self.mask)
        self.extras = {name: _unpacked(values) for name, values in self.extras.items()}


@dataclass(frozen=True)
class _Packed:
    """A tensor as bytes; numpy has no bfloat16, so dtype and shape travel beside them."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: np.ndarray


def _packed(values: Any) -> Any:
    if not isinstance(values, torch.Tensor):
        return values
    return _Packed(values.dtype, tuple(values.shape), values.reshape(-1).view(torch.uint8).numpy())


def _unpacked(values: Any) -> Any:
    if not isinstance(values, _Packed):
        return values
    if not values.data.size:  # no bytes can be viewed as another type
        return torch.empty(values.shape, dtype=values.dtype)
    return torch.from_numpy(values.data).view(values.dtype).view(values.shape)
