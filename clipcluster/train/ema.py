"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """Tensors that follow the model's weights: `average += (1 - decay) * (weights - average)` after a step.

    Buffers (running statistics) are the model's own and not averaged. The state has the model's names.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._rate = model, 1.0 - decay
        self._parameters = list(model.parameters())
        self._followed = [parameter.data for parameter in self._parameters]
        self._averaged = [weights.clone() for weights in self._followed]

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Follow by one step, or stay where `found_inf` (0-dimensional, on the device) is 1."""
        # lerp written out: its foreach form takes no weight that lives on the device.
        rate = self._rate * (1.0 - found_inf)
        distance = torch._foreach_sub(self._followed, self._averaged)
        torch._foreach_mul_(distance, rate)
        torch._foreach_add_(self._averaged, distance)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model computes with the averaged weights; nothing is copied."""
        self._point_at(self._averaged)
        try:
            yield
        finally:
            self._point_at(self._followed)

    def _point_at(self, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self._parameters, tensors, strict=True):
            parameter.data = tensor

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the model's buffers, by the model's names."""
        with self.applied():
            return self._model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take averaged weights, all of them; buffers go to the model."""
        with self.applied():
            self._model.load_state_dict(state)
