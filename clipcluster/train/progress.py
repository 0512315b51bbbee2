"""The progress of a run, which alone decides its next step, and the batches from there on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from clipcluster.train.work import Work

if TYPE_CHECKING:
    from clipcluster.data.loading.batch import Batch
    from clipcluster.data.loading.loader import Loader


class Progress:
    """Counts of what was consumed. `batches_drawn` and `skipped` are the whole state of the data.

    step: optimizer steps done, those that changed nothing included. samples: samples consumed by them.
    batches_drawn: index of the next batch. evaluated_step: the last step that was evaluated, -1 before.
    skipped: half-open ranges (first, past the last) of batches that a roll-back skips.
    """

    def __init__(self, *, steps_per_epoch: int, batch_size: int) -> None:
        self.steps_per_epoch, self.batch_size = steps_per_epoch, batch_size
        self.step = self.samples = self.batches_drawn = 0
        self.evaluated_step = -1
        self.skipped: list[tuple[int, int]] = []

    @property
    def epoch(self) -> float:
        """Epochs done, a fraction."""
        return self.step / self.steps_per_epoch

    def advance(self, batch: Batch) -> None:
        """Count a batch that a step consumed."""
        self.step += 1
        self.samples += self.batch_size
        self.batches_drawn = batch.index + 1

    def counts(self) -> dict[str, Any]:
        """`step`, `samples` and `epoch`, as records have them."""
        return {"step": self.step, "samples": self.samples, "epoch": round(self.epoch, 6)}

    def state_dict(self) -> dict[str, Any]:
        """Plain values, as state.json has them."""
        return {
            **self.counts(),
            "batches_drawn": self.batches_drawn,
            "evaluated_step": self.evaluated_step,
            "skipped": [list(pair) for pair in self.skipped],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved counts."""
        self.step, self.samples = state["step"], state["samples"]
        self.batches_drawn, self.evaluated_step = state["batches_drawn"], state["evaluated_step"]
        self.skipped = [(first, past) for first, past in state["skipped"]]


class Feed:
    """The batches from a given progress on, without the ranges that it skips, moved to the device.

    Args:
        open_batches: opens the loader at a progress.
        work: told of every wait for a batch.
    """

    def __init__(
        self,
        open_batches: Callable[[Progress], Loader],
        device: torch.device,
        work: Work,
    ) -> None:
        self._open_batches, self._device, self._work = open_batches, device, work
        self._loader: Loader | None = None
        self._batches: Iterator[Batch] = iter(())

    def open(self, progress: Progress) -> None:
        """Begin at the next batch of `progress`."""
        self.close()
        self._loader = self._open_batches(progress)
        self._batches = iter(self._loader)

    def next(self) -> Batch:
        """The next batch, on the device."""
        self._work.fetch()
        batch = next(self._batches)
        self._work.fetched()
        return batch.to(self._device)

    def close(self) -> None:
        """End the loader's workers. Harmless where nothing is open."""
        if self._loader:
            self._loader.close()
        self._loader = None
