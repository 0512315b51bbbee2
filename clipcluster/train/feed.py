"""The batches of a run, in order, one after the other onto the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch

from clipcluster.train.progress import Progress

if TYPE_CHECKING:
    from clipcluster.data.loading.batch import Batch


class Batches(Protocol):
    """Batches in their order, from some batch on."""

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None: ...


class Feed:
    """Batches from the next one of a progress on, without the ranges that it skips.

    Args:
        open_batches: opens them.
        waited: called with the seconds that each batch was waited for.
    """

    def __init__(
        self,
        open_batches: Callable[[Progress], Batches],
        device: torch.device,
        waited: Callable[[float], None],
    ) -> None:
        self._open_batches, self._device, self._waited = open_batches, device, waited
        self._loader: Batches | None = None
        self._batches: Iterator[Batch] = iter(())
        self._ahead: Batch | None = None

    def open(self, progress: Progress) -> None:
        """Begin at the next batch of `progress`."""
        self.close()
        self._loader = self._open_batches(progress)
        self._batches = iter(self._loader)

    def next(self) -> Batch:
        """The next batch, on the device."""
        batch, self._ahead = self._ahead, None
        if batch is None:
            began = time.monotonic()
            batch = next(self._batches).to(self._device)
            self._waited(time.monotonic() - began)
        return batch

    def peek(self) -> Batch:
        """The batch that `next` returns, before it does."""
        self._ahead = self.next()
        return self._ahead

    def close(self) -> None:
        """End the loader's workers. Harmless where nothing is open."""
        if self._loader:
            self._loader.close()
        self._loader, self._ahead, self._batches = None, None, iter(())
