"""One optimizer step: gradients, test, update, average. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipcluster.model.task import Report
from clipcluster.train.backward import Backward
from clipcluster.train.ema import Ema
from clipcluster.train.optimizer import Optimizer
from clipcluster.train.progress import Progress
from clipcluster.train.schedule import Schedule
from clipcluster.train.stages import Stages

if TYPE_CHECKING:
    from clipcluster.data.loading.batch import Batch


@dataclass(frozen=True)
class Streak:
    """The longest streak of consecutive non-finite steps since the last reading, with its batches."""

    length: int
    first_batch: int
    last_batch: int
    total: int
    """All counted non-finite steps of this process so far, in and outside the streak."""

    def __str__(self) -> str:
        batches = f"batches {self.first_batch} to {self.last_batch}"
        return f"{self.length} steps in a row had a loss or gradient that is not finite ({batches})"


class Guard:
    """Tests the reduced gradient norm of every step, and counts non-finite ones, all on the device.

    A checkpoint holds its streaks, so that a run that is stopped within one continues it.
    """

    may_be_absent = True  # from a checkpoint of before streaks were saved

    def __init__(self, device: torch.device, limit: int) -> None:
        """`limit`: the number of counted non-finite steps in a row that a run survives."""
        self.limit = limit
        self._streak = torch.zeros(3, dtype=torch.int64, device=device)  # length, first batch, last batch
        self._longest = torch.zeros_like(self._streak)
        self._total = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, norm: Tensor, counts: Tensor, batch_index: int) -> Tensor:
        """`found_inf` of a step: 1.0 where the norm of its reduced gradients is not finite, else 0.0.

        Where `counts` (0-dimensional bool) is False a non-finite step neither lengthens nor ends a streak.
        """
        found = ~torch.isfinite(norm)
        bad = found & counts
        length, first, last = self._streak
        first = torch.where(bad & (length == 0), batch_index, first)
        last = torch.where(bad, batch_index, last)
        length = torch.where(found, length + bad, 0)
        self._streak = torch.stack((length, first, last))
        self._longest = torch.where(length > self._longest[0], self._streak, self._longest)
        self._total += bad
        return found.float()

    def read(self) -> Streak:
        """The longest streak since the last reading, or the unfinished one. Waits for the device."""
        length, first, last, total = torch.cat((self._longest, self._total[None])).tolist()
        self._longest = self._streak.clone()
        return Streak(length, first, last, total)

    def first_unread(self) -> int | None:
        """The first batch of the streak that `read` would return, if there is one. Waits for the device."""
        length, first, _ = self._longest.tolist()
        return first if length else None

    def state_dict(self) -> dict[str, Any]:
        """`streak` and `longest`: length, first and last batch of each. Waits for the device."""
        return {"streak": self._streak.tolist(), "longest": self._longest.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved streak; without a state none. Raises KeyError where it is incomplete."""
        none = [0, 0, 0]
        streak, longest = (state["streak"], state["longest"]) if state else (none, none)
        self._streak = torch.tensor(streak, dtype=torch.int64, device=self._total.device)
        self._longest = torch.tensor(longest, dtype=torch.int64, device=self._total.device)


@dataclass
class Step:
    """One optimizer step, from a batch to updated weights.

    backward: turns a batch into gradients; it holds the task, the precision and the running statistics.
    clip_norm: upper bound of the norm of the whole gradient, or None. clip_value: upper bound of the absolute
    value of each entry of the gradient, applied after `clip_norm`, or None.
    """

    backward: Backward
    stages: Stages
    optimizer: Optimizer
    schedule: Schedule
    guard: Guard
    ema: Ema | None
    clip_norm: float | None
    clip_value: float | None = None

    def __call__(self, batch: Batch, progress: Progress) -> Report:
        """Train on a batch, which is on the device. Returns the task's report, on the device too."""
        precision, statistics = self.backward.precision, self.backward.statistics
        self.optimizer.clear()
        statistics.begin()
        report = self.backward(batch, progress.step)
        norm = gradient_norm(self.optimizer.gradients()) / precision.scale
        found_inf = self.guard(norm, precision.counts(), batch.index)
        clipping = 1.0 if self.clip_norm is None else (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        divisor = precision.scale / clipping
        if self.clip_value is not None:
            clip_values(self.optimizer.gradients(), divisor, self.clip_value)
            divisor = torch.ones_like(divisor)
        self.optimizer.step(self.schedule(progress.step), progress.step, divisor=divisor, found_inf=found_inf)
        statistics.commit(found_inf)
        self.backward.task.task.after_step()
        if self.ema:
            self.ema.update(found_inf, progress.step)
        precision.update(found_inf)
        return replace(report, metrics={**report.metrics, "gradient_norm": norm})

    @property
    def needs_rehearsal(self) -> bool:
        """Whether the task was wrapped since the last rehearsal."""
        return self.backward.task.needs_rehearsal

    def rehearse(self, batch: Batch) -> None:
        """One discarded forward and backward pass, which follows every wrapping and changes nothing."""
        self.optimizer.clear()
        self.backward.statistics.begin()
        self.backward.rehearse(batch)
        self.backward.statistics.put_back()
        self.optimizer.clear()


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, 0-dimensional float32 on their device."""
    if not gradients:
        raise ValueError("no parameter has a gradient: the loss does not depend on the model")
    norms = torch._foreach_norm(gradients)
    return torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))


def clip_values(gradients: list[Tensor], divisor: Tensor, largest: float) -> None:
    """Divide the gradients by `divisor`, in place, then bring every entry to within `largest` of zero."""
    torch._foreach_div_(gradients, divisor)
    torch._foreach_clamp_min_(gradients, -largest)
    torch._foreach_clamp_max_(gradients, largest)
