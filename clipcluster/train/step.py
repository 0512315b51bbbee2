"""One optimizer step: forward, backward, test, update, average. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clipcluster.model.task import Report, Task
from clipcluster.runtime.devices import seed_step
from clipcluster.train.ema import Ema
from clipcluster.train.guard import Guard
from clipcluster.train.optimizer import Optimizer
from clipcluster.train.precision import Precision
from clipcluster.train.progress import Progress
from clipcluster.train.schedule import Schedule

if TYPE_CHECKING:
    from clipcluster.data.loading.batch import Batch


class Step:
    """What happens to the weights between two boundaries.

    Args:
        task: the module that turns a batch into a `Report`; DDP around it where there are several ranks.
        bare_task: the same without DDP (`after_step`, the buffers).
        clip_norm: largest norm of the whole gradient, or None.
        seed, slot: with the step they seed dropout and drop path; `slot` is this rank's first of the batch.
    """

    def __init__(
        self,
        task: nn.Module,
        bare_task: Any,
        optimizer: Optimizer,
        schedule: Schedule,
        precision: Precision,
        guard: Guard,
        ema: Ema | None,
        *,
        clip_norm: float | None,
        seed: int,
        slot: int,
    ) -> None:
        self.task, self.bare_task = task, bare_task
        self.optimizer, self.schedule, self.precision = optimizer, schedule, precision
        self.guard, self.ema = guard, ema
        self._clip_norm, self._seed, self._slot = clip_norm, seed, slot
        saved = bare_task.state_dict(keep_vars=True)  # without what is constant
        self._buffers = [buffer for name, buffer in bare_task.named_buffers() if name in saved]

    def __call__(self, batch: Batch, progress: Progress) -> Report:
        """Train on a batch, which lies on the device; returns what the task reports, still on the device."""
        before = self._copy_buffers()
        self.optimizer.clear()
        report = self._gradients(batch, progress)
        norm = gradient_norm(self.optimizer.gradients()) / self.precision.scale
        found_inf = self.guard.judge(norm)
        divisor = self.precision.scale / self._clipping(norm)
        self.optimizer.step(self.schedule(progress.step), divisor=divisor, found_inf=found_inf)
        self._restore_buffers(before, found_inf)
        self.bare_task.after_step()
        if self.ema:
            self.ema.update(found_inf)
        self.guard.observe(found_inf, self.precision.counts(), batch.index)
        self.precision.update(found_inf)
        return replace(report, metrics={**report.metrics, "gradient_norm": norm})

    def _gradients(self, batch: Batch, progress: Progress) -> Report:
        seed_step(self._seed, progress.step, self._slot)
        with self.precision.autocast():
            report: Report = self.task(Task.report, batch)
        report.loss.backward(self.precision.seed_gradient(report.loss.detach()))
        return report

    def _clipping(self, norm: Tensor) -> Tensor:
        if self._clip_norm is None:
            return torch.ones_like(norm)
        return (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)

    @property
    def needs_rehearsal(self) -> bool:
        """Whether the first two passes would reduce gradients in another order than all later ones."""
        return self.task is not self.bare_task

    def rehearse(self, batch: Batch, progress: Progress) -> None:
        """One forward and backward pass that changes nothing: running statistics are put back.

        DDP rebuilds its buckets after its first backward pass, so that sums over ranks round differently
        from then on; two such passes after every wrapping make all real steps alike.
        """
        before = self._copy_buffers()
        self.optimizer.clear()
        self._gradients(batch, progress)
        self.optimizer.clear()
        self._restore_buffers(before, torch.ones((), device=self.precision.device))

    def _copy_buffers(self) -> list[Tensor]:
        """Running statistics before a pass: a batch that is skipped must not stay in them."""
        return [buffer.clone() for buffer in self._buffers]

    def _restore_buffers(self, before: list[Tensor], found_inf: Tensor) -> None:
        """Put the running statistics back where `found_inf` is 1."""
        for buffer, old in zip(self._buffers, before, strict=True):
            buffer.copy_(torch.where(found_inf.bool(), old, buffer))


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
