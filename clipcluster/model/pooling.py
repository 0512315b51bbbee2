"""A caption's vector from its tokens' vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def last_real(states: Tensor, mask: Tensor) -> Tensor:
    """(B, L, width) and (B, L) bool -> (B, width): of the last real token, of the first where none is."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * mask).argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), last]


def mean_of_real(states: Tensor, mask: Tensor) -> Tensor:
    """(B, L, width) and (B, L) bool, true at least once a row -> (B, width)."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)
