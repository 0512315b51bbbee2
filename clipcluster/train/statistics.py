"""Running statistics (of batch norms), which change once per step and equally on all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipcluster.runtime.world import World


class RunningStatistics:
    """The buffers of a module that a forward pass in training may change.

    The new values of a step are the mean, over its micro-batches on all ranks, of what each made of the old
    values; with equal micro-batches they do not depend on the number of ranks. Integer buffers (the count of
    batches) change as in the first micro-batch. Buffers that are constant stay exactly as they are.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        saved = module.state_dict(keep_vars=True)  # without what is constant
        buffers = [buffer for name, buffer in module.named_buffers() if name in saved]
        self._buffers = sorted(buffers, key=lambda buffer: not buffer.is_floating_point())
        self._floats = sum(buffer.is_floating_point() for buffer in buffers)
        self._world = world
        self._before: list[Tensor] = []
        self._passes: list[list[Tensor]] = []

    def begin(self) -> None:
        """Remember the values at the beginning of a step."""
        self._before = [buffer.clone() for buffer in self._buffers]
        self._passes = []

    def take(self) -> None:
        """Keep the values that the forward pass of a micro-batch left."""
        self._passes.append([buffer.clone() for buffer in self._buffers])

    def put_back(self) -> None:
        """Restore the values of `begin`; not before the backward pass, which may need the new ones."""
        for buffer, old in zip(self._buffers, self._before, strict=True):
            buffer.copy_(old)

    def commit(self, found_inf: Tensor) -> None:
        """Set the step's new values; the old ones where `found_inf` (0-dimensional, on the device) is 1.

        Collective where there are buffers.
        """
        if not self._buffers:
            return
        passes = self._passes
        after = list(passes[0])
        if len(passes) * self._world.size > 1:
            after[: self._floats] = self._mean([values[: self._floats] for values in passes])
        for buffer, old, new in zip(self._buffers, self._before, after, strict=True):
            buffer.copy_(torch.where(found_inf.bool(), old, new))

    def _mean(self, passes: list[list[Tensor]]) -> list[Tensor]:
        """Old values plus the mean move, over micro-batches and ranks."""
        before = self._before[: self._floats]
        if not before:
            return []
        moves = torch.zeros_like(torch.cat([value.flatten() for value in before]))
        for values in passes:
            pairs = zip(before, values, strict=True)
            # A constant infinity does not move: its difference would be NaN.
            own = [torch.where(new == old, 0, new - old).flatten() for old, new in pairs]
            moves += torch.cat(own)
        moves = self._world.all_reduce_sum(moves) / (len(passes) * self._world.size)
        parts = moves.split([value.numel() for value in before])
        return [old + move.view_as(old) for old, move in zip(before, parts, strict=True)]
