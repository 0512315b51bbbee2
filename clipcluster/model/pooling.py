"""A caption's vector from its tokens' vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def last_of(mask: Tensor) -> Tensor:
    """(B, L) bool -> (B,) int64: the place of the last real token, 0 where there is none."""
    return (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(dim=1)


def at(states: Tensor, places: Tensor) -> Tensor:
    """(B, L, width) and (B,) -> (B, width): of each row the vector at its place."""
    return states[torch.arange(len(states), device=states.device), places]


def mean_of_real(states: Tensor, mask: Tensor) -> Tensor:
    """(B, L, width) and (B, L) bool, true at least once a row -> (B, width)."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)
