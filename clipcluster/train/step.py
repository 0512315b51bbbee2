"""One optimizer step: gradients, test, update, average. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipcluster.model.task import Report
from clipcluster.train.backward import Backward
from clipcluster.train.ema import Ema
from clipcluster.train.guard import Guard
from clipcluster.train.optimizer import Optimizer
from clipcluster.train.progress import Progress
from clipcluster.train.schedule import Schedule
from clipcluster.train.stages import Stages

if TYPE_CHECKING:
    from clipcluster.data.loading.batch import Batch


class Step:
    """What happens to the weights between two boundaries.

    Args:
        backward: turns a batch into gradients; it brings the task, its precision and running statistics.
        clip_norm: largest norm of the whole gradient, or None.
    """

    def __init__(
        self,
        backward: Backward,
        stages: Stages,
        optimizer: Optimizer,
        schedule: Schedule,
        guard: Guard,
        ema: Ema | None,
        *,
        clip_norm: float | None,
    ) -> None:
        self.backward, self.stages, self.optimizer = backward, stages, optimizer
        self.schedule, self.guard, self.ema = schedule, guard, ema
        self.precision, self._statistics = backward.precision, backward.statistics
        self._clip_norm = clip_norm

    def __call__(self, batch: Batch, progress: Progress) -> Report:
        """Train on a batch, which lies on the device; returns what the task reports, still on the device."""
        self.optimizer.clear()
        self._statistics.begin()
        report = self.backward(batch, progress.step)
        norm = gradient_norm(self.optimizer.gradients()) / self.precision.scale
        found_inf = self.guard.judge(norm)
        divisor = self.precision.scale / self._clipping(norm)
        self.optimizer.step(self.schedule(progress.step), divisor=divisor, found_inf=found_inf)
        self._statistics.commit(found_inf)
        self.backward.task.task.after_step()
        if self.ema:
            self.ema.update(found_inf)
        self.guard.observe(found_inf, self.precision.counts(), batch.index)
        self.precision.update(found_inf)
        return replace(report, metrics={**report.metrics, "gradient_norm": norm})

    def _clipping(self, norm: Tensor) -> Tensor:
        if self._clip_norm is None:
            return torch.ones_like(norm)
        return (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)

    @property
    def needs_rehearsal(self) -> bool:
        """Whether the task was wrapped since the last rehearsal."""
        return self.backward.task.needs_rehearsal

    def rehearse(self, batch: Batch) -> None:
        """One forward and backward pass that changes nothing; it follows every wrapping."""
        self.optimizer.clear()
        self._statistics.begin()
        self.backward.rehearse(batch)
        self._statistics.put_back()
        self.optimizer.clear()


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, 0-dimensional float32 on their device."""
    if not gradients:
        raise ValueError("no parameter has a gradient: the loss does not depend on the model")
    norms = torch._foreach_norm(gradients)
    return torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))


def plain_metrics(report_metrics: Mapping[str, Tensor]) -> tuple[list[str], Tensor]:
    """The metrics' names, sorted, and their values as one float64 tensor on their device."""
    names = sorted(report_metrics)
    values = [report_metrics[name].detach().reshape(()).double() for name in names]
    return names, torch.stack(values)
