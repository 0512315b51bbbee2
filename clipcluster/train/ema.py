"""An exponential moving average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """A second model whose weights follow the first: `ema += (1 - decay) * (weights - ema)` after a step.

    Buffers (running statistics) are copied, not averaged. The state is the averaged model's own.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._rate = 1.0 - decay
        self._averaged = [p.data for p in self.model.parameters()]
        self._followed = [p.data for p in model.parameters()]
        self._buffers = list(self.model.buffers())
        self._followed_buffers = list(model.buffers())

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Follow by one step, or stay where `found_inf` (0-dimensional, on the device) is 1."""
        # lerp written out: its foreach form takes no weight that lives on the device.
        rate = self._rate * (1.0 - found_inf)
        distance = torch._foreach_sub(self._followed, self._averaged)
        torch._foreach_mul_(distance, rate)
        torch._foreach_add_(self._averaged, distance)
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._followed_buffers)

    def state_dict(self) -> dict[str, Any]:
        """The averaged model's weights and buffers."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take weights and buffers, all of them."""
        self.model.load_state_dict(state)
