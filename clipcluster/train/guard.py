"""Losses and gradients that are not finite: skipped on the device, counted, and ended when they persist."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Streak:
    """The longest row of non-finite steps since the last reading: its length, first and last batch."""

    length: int
    first_batch: int
    last_batch: int
    total: int
    """All counted non-finite steps of this process so far."""


class Guard:
    """Tests the reduced gradient norm of every step without waiting for the device."""

    def __init__(self, device: torch.device, limit: int) -> None:
        """`limit`: the number of counted non-finite steps in a row that a run survives."""
        self.limit = limit
        self._row = torch.zeros(3, dtype=torch.int64, device=device)  # length, first batch, last batch
        self._longest = torch.zeros_like(self._row)
        self._total = torch.zeros((), dtype=torch.int64, device=device)

    def judge(self, norm: Tensor) -> Tensor:
        """`found_inf` of a step: 1.0 where the norm of its reduced gradients is not finite, else 0.0."""
        return (~torch.isfinite(norm)).float()

    def observe(self, found_inf: Tensor, counts: Tensor, batch_index: int) -> None:
        """Count a step. Where `counts` is False a non-finite step neither lengthens nor ends a row."""
        found = found_inf.bool()
        bad = found & counts
        length, first, last = self._row
        first = torch.where(bad & (length == 0), batch_index, first)
        last = torch.where(bad, batch_index, last)
        length = torch.where(found, length + bad, 0)
        self._row = torch.stack((length, first, last))
        self._longest = torch.where(length > self._longest[0], self._row, self._longest)
        self._total += bad

    def read(self) -> Streak:
        """The longest row since the last reading, or the one that has not ended. Waits for the device."""
        length, first, last, total = torch.cat((self._longest, self._total[None])).tolist()
        self._longest = self._row.clone()
        return Streak(length, first, last, total)

    def reset(self) -> None:
        """Forget the rows, after a roll-back."""
        self._row.zero_()
        self._longest.zero_()
