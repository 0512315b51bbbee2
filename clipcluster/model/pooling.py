"""Pooling: the features of a caption from those of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def last_of(mask: Tensor) -> Tensor:
    """(B, L) bool mask -> (B,) int64: the position of the last real token, 0 where there is none."""
    return (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(dim=1)


def at(states: Tensor, positions: Tensor) -> Tensor:
    """(B, L, width) and (B,) int64 -> (B, width): the features at one position of each row."""
    # shape, not len(): a graph of any batch size is traced through it
    return states[torch.arange(states.shape[0], device=states.device), positions]


def mean_of_real(states: Tensor, mask: Tensor) -> Tensor:
    """(B, L, width) and (B, L) bool mask, True at least once per row -> (B, width): the mean over tokens."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1)
