"""How a batch becomes gradients: in one pass, in independent micro-batches, or with cached features.

All of it runs through the wrapped task. Three errors that show in no message are avoided here: a parameter of
the loss that is differentiated in every micro-batch counts too often; the gradients of a call beside the
wrapper are not reduced; a second pass with other random numbers differentiates another function than the one
whose loss was computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipcluster.model.task import Features, Report, Task
from clipcluster.runtime.devices import seed_step
from clipcluster.train.compiling import uncompiled
from clipcluster.train.precision import Precision
from clipcluster.train.statistics import RunningStatistics
from clipcluster.train.wrapping import WrappedTask

if TYPE_CHECKING:
    from clipcluster.data.loading.batch import Batch

REHEARSED_SAMPLES = 2  # a batch norm in training needs more than one


class Backward(ABC):
    """Leaves in every trained parameter's `grad` the gradient of the loss over the batch of all ranks.

    It is multiplied by the precision's loss scale, and NaN where the loss of any rank is not finite.

    Args:
        statistics: the task's running statistics; the caller calls their `begin` before and `commit` after.
        seed, slot: with the step they seed dropout and drop path; `slot` is this rank's first in the batch.
        micro_batches: the number of equal micro-batches into which a rank's part of the batch is cut.
    """

    def __init__(
        self,
        task: WrappedTask,
        precision: Precision,
        statistics: RunningStatistics,
        *,
        seed: int,
        slot: int,
        micro_batches: int = 1,
    ) -> None:
        self.task, self.precision, self.statistics = task, precision, statistics
        self._seed, self._slot, self._count = seed, slot, micro_batches

    @abstractmethod
    def __call__(self, batch: Batch, step: int) -> Report:
        """Differentiate a rank's part of the batch, on the device. Returns the task's report, detached."""

    def rehearse(self, batch: Batch) -> None:
        """One reduced pass over a few samples, to be discarded (see `WrappedTask.needs_rehearsal`)."""
        few = batch.cut(0, min(REHEARSED_SAMPLES, len(batch)))
        with uncompiled(), self.precision.autocast():
            report = self.task(Task.report, few)
        report.loss.backward(torch.zeros_like(report.loss))
        self.task.needs_rehearsal = False

    def _micro_batches(self, batch: Batch, step: int) -> Iterator[Batch]:
        """The micro-batches; torch's random generators are seeded for each before it is yielded."""
        slot = self._slot
        for micro_batch in batch.micro_batches(self._count):
            seed_step(self._seed, step, slot)
            yield micro_batch
            slot += len(micro_batch)


class Whole(Backward):
    """One pass over the whole of a rank's part of the batch."""

    def __call__(self, batch: Batch, step: int) -> Report:
        seed_step(self._seed, step, self._slot)
        with self.precision.autocast():
            report = self.task(Task.report, batch)
        self.statistics.take()
        report.loss.backward(self.precision.seed_gradient(report.loss.detach()))
        self.statistics.put_back()
        return Report(report.loss.detach(), report.metrics)


class Independent(Backward):
    """One pass per micro-batch, for a loss that is a mean over samples: its gradient is the mean of theirs.

    A loss over the batch would see only the negatives of a micro-batch: use `Cached`.
    """

    def __call__(self, batch: Batch, step: int) -> Report:
        reports = []
        for number, micro_batch in enumerate(self._micro_batches(batch, step), start=1):
            with self.task.reduction(number == self._count):
                with self.precision.autocast():
                    report = self.task(Task.report, micro_batch)
                self.statistics.take()
                loss = report.loss.detach()
                report.loss.backward(self.precision.seed_gradient(loss) / self._count)
            self.statistics.put_back()
            reports.append(Report(loss, report.metrics))
        return _mean(reports)


class Cached(Backward):
    """The loss of the whole batch with the memory of a micro-batch (GradCache, Gao et al. 2021).

    First the features of all micro-batches are computed without gradients; then the loss on all of them is
    differentiated with respect to the features and to the parameters that the loss itself uses (logit scale,
    bias); then each micro-batch is computed again with the same random numbers, and the gradients of its
    features are propagated into the towers. The gradients of the loss's own parameters are added in the last
    micro-batch, whose backward pass alone is reduced over the ranks. Where only those parameters train there
    is no second pass.
    """

    def __call__(self, batch: Batch, step: int) -> Report:
        with self.task.reduction(False):
            cached = self._features(batch, step)
            report, by_feature, by_parameter = self.task(differentiate, cached, self.precision)
        if self._trained() <= by_parameter.keys():  # what makes the features is frozen: no second pass
            if by_parameter:
                self.task(_product, batch, {}, by_parameter).backward()
            return report
        for number, micro_batch in enumerate(self._micro_batches(batch, step), start=1):
            last = number == self._count
            own = slice((number - 1) * len(micro_batch), number * len(micro_batch))
            rows = {name: gradient[own] for name, gradient in by_feature.items()}
            with self.task.reduction(last):
                with self.precision.autocast():
                    product = self.task(_product, micro_batch, rows, by_parameter if last else {})
                if product.requires_grad:  # not where all features are of frozen towers
                    product.backward()
            self.statistics.put_back()
        return report

    def _trained(self) -> set[str]:
        return {name for name, value in self.task.task.named_parameters() if value.requires_grad}

    def _features(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The features of all samples of this rank, without gradients."""
        parts: list[Features] = []
        for micro_batch in self._micro_batches(batch, step):
            with torch.no_grad(), self.precision.autocast():
                parts.append(self.task(Task.features, micro_batch))
            self.statistics.take()
            self.statistics.put_back()
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def differentiate(
    task: Task, features: Features, precision: Precision
) -> tuple[Report, dict[str, Tensor], dict[str, Tensor]]:
    """The loss, and its gradients with respect to features and to parameters that the loss itself uses."""
    leaves = {
        name: value.detach().requires_grad_() for name, value in features.items() if value.is_floating_point()
    }
    # Looked up here: inside the wrapper's forward FSDP2 has gathered the parameters.
    parameters = {name: value for name, value in task.named_parameters() if value.requires_grad}
    with precision.autocast():
        report = task.loss({**features, **leaves})
    loss = report.loss.detach()
    gradients = torch.autograd.grad(
        report.loss,
        [*leaves.values(), *parameters.values()],
        precision.seed_gradient(loss),
        allow_unused=True,
    )
    found = dict(zip([*leaves, *parameters], gradients, strict=True))
    return (
        Report(loss, report.metrics),
        {name: gradient for name in leaves if (gradient := found[name]) is not None},
        {name: gradient for name in parameters if (gradient := found[name]) is not None},
    )


def _product(
    task: Task, micro_batch: Batch, by_feature: Mapping[str, Tensor], by_parameter: Mapping[str, Tensor]
) -> Tensor:
    """A scalar with these gradients: the sum of features and parameters, each times its own gradient."""
    features, parameters = task.encode(micro_batch) if by_feature else {}, dict(task.named_parameters())
    terms = [
        (features[name] * gradient).sum()
        for name, gradient in by_feature.items()
        if features[name].requires_grad
    ]
    terms += [(parameters[name] * gradient).sum() for name, gradient in by_parameter.items()]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def _mean(reports: Sequence[Report]) -> Report:
    """The mean over the reports of micro-batches of equal size."""
    metrics = {
        name: torch.stack([report.metrics[name] for report in reports]).mean() for name in reports[0].metrics
    }
    return Report(torch.stack([report.loss for report in reports]).mean(), metrics)
