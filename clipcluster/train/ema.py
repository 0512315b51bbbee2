"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipcluster.model.norms import batch_norms


def decay_at(step: int, decay: float, *, warmup: bool) -> float:
    """The decay of the update that follows optimizer step `step` (steps count from 0).

    With `warmup` it is at most `1 - n^(-2/3)` for the n-th update, n = step + 1 (timm's ModelEmaV3 with
    use_warmup, gamma 1 and power 2/3): 0 at the first update, which copies the weights.
    """
    return min(decay, 1.0 - (step + 1) ** (-2 / 3)) if warmup else decay


class Ema:
    """The moving average of a model's weights: `average += (1 - decay) * (weights - average)` at each step.

    The running statistics of batch norms are averaged too, as in timm's ModelEmaV3: those of the raw weights
    do not fit averaged weights. All other buffers are the model's own. The state dict has the model's names.
    The decay is a function of the step, so that nothing but the tensors is saved.

    device: where the average is kept, by default with the weights. On another device (the CPU, to save a
    GPU's memory) an update copies all weights there and waits for them.
    """

    def __init__(
        self, model: nn.Module, decay: float, *, warmup: bool = False, device: torch.device | None = None
    ) -> None:
        self._model, self._decay, self._warmup, self._device = model, decay, warmup, device
        statistics = [(norm.running_mean, norm.running_var) for norm in batch_norms(model)]
        running = [buffer for pair in statistics for buffer in pair if isinstance(buffer, Tensor)]
        self._tensors: list[Tensor] = [*model.parameters(), *running]
        self._followed = [tensor.data for tensor in self._tensors]
        self._averaged = [weights.clone().to(device=device) for weights in self._followed]

    def restart(self) -> None:
        """Begin with the weights as they are now."""
        for average, weights in zip(self._averaged, self._followed, strict=True):
            average.copy_(weights)

    @torch.no_grad()
    def update(self, found_inf: Tensor, step: int) -> None:
        """Average the weights after optimizer step `step`; nothing where `found_inf` (() float32) is 1."""
        # lerp written out: its foreach form takes no weight that lives on the device.
        rate = (1.0 - decay_at(step, self._decay, warmup=self._warmup)) * (1.0 - found_inf)
        followed = [weights.to(device=self._device) for weights in self._followed]
        distance = torch._foreach_sub(followed, self._averaged)
        torch._foreach_mul_(distance, rate.to(device=self._device))
        torch._foreach_add_(self._averaged, distance)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model computes with the averaged weights; they are copied only from another device."""
        pairs = zip(self._averaged, self._followed, strict=True)
        with self._pointed_at([average.to(weights.device) for average, weights in pairs]):
            yield

    @contextmanager
    def _pointed_at(self, tensors: list[Tensor]) -> Iterator[None]:
        """Inside, the model's parameters and running statistics are these tensors."""
        self._point_at(tensors)
        try:
            yield
        finally:
            self._point_at(self._followed)

    def _point_at(self, tensors: list[Tensor]) -> None:
        torch.clear_autocast_cache()  # it keeps casts by parameter, whatever data that points at
        for own, tensor in zip(self._tensors, tensors, strict=True):
            own.data = tensor

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and statistics and the model's other buffers, by the model's names."""
        with self._pointed_at(self._averaged):
            return self._model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load averaged weights and statistics, all of them; other buffers go to the model."""
        with self._pointed_at(self._averaged):
            self._model.load_state_dict(state)
