"""Resampling position embeddings for a tower of another image size, patch grid or context length."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc, resize_rel_pos_bias_table
from torch import Tensor, nn
from torch.nn import functional

_GRID = re.compile(r"(^|\.)(pos_embed(_?\d+)?|position_embeddings|position_embedding\.weight)$")
_WINDOW = re.compile(r"(^|\.)relative_position_bias_table$")
_CONTEXT = re.compile(
    r"(^|\.)(positional_embedding|wpe\.weight|(embed_positions|position_embeddings?)\.weight)$"
)
_PREFIXES = range(9)  # class tokens and registers that may stand before the patches


def fit_positions(
    tower: nn.Module, state: Mapping[str, Tensor], *, text: bool | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors with position embeddings resampled to the tower's positions; and how, by name.

    state: the file's tensors by the tower's names. text: whether the tower is one of text; by default names
    that begin with `text` are (of a whole model).

    Images: the grid is interpolated, bicubic with antialiasing (timm's resample_abs_pos_embed), and so are
    the tables of relative positions in windows (timm's resize_rel_pos_bias_table); class token and registers
    stay. Text: a shorter context takes the first rows, a longer one is interpolated linearly, except for
    rows that are no position. A tensor that cannot be brought to the tower's shape stays as it is.
    """
    own = tower.state_dict()
    fitted, done = dict(state), {}
    for name, value in state.items():
        if name not in own or own[name].shape == value.shape or not value.is_floating_point():
            continue
        wanted = own[name].shape
        if name.startswith("text") if text is None else text:
            found = _context(value, wanted, _offset(tower, name)) if _CONTEXT.search(name) else None
        elif _WINDOW.search(name):
            found = _window(value, wanted, tower.get_submodule(name.rpartition(".")[0]))
        else:
            found = _grid(value, wanted) if _GRID.search(name) else None
        if found is not None and found[0].shape == wanted:
            fitted[name], done[name] = found
    return fitted, done


def _grid(value: Tensor, wanted: torch.Size) -> tuple[Tensor, str] | None:
    """Embeddings of a square of patches: (1, prefix + patches, C), (prefix + patches, C), (1, H, W, C)."""
    if value.ndim == 4 == len(wanted):
        how = f"interpolated from {value.shape[1]} x {value.shape[2]} to {wanted[1]} x {wanted[2]} patches"
        return resample_abs_pos_embed_nhwc(value, [wanted[1], wanted[2]]), how
    if value.ndim != len(wanted) or value.ndim not in (2, 3) or value.shape[-1] != wanted[-1]:
        return None
    for prefix in _PREFIXES:
        before, after = (_side(shape[-2] - prefix) for shape in (value.shape, wanted))
        if before and after:
            batched = value if value.ndim == 3 else value.unsqueeze(0)
            resampled = resample_abs_pos_embed(
                batched, new_size=[after, after], old_size=[before, before], num_prefix_tokens=prefix
            )
            how = f"interpolated from {before} x {before} to {after} x {after} patches"
            return resampled.reshape(wanted), how
    return None


def _side(patches: int) -> int:
    """The side of a square grid of so many patches; 0 where they make none."""
    side = isqrt(max(patches, 0))
    return side if side * side == patches else 0


def _window(value: Tensor, wanted: torch.Size, attention: Any) -> tuple[Tensor, str] | None:
    """Biases of relative positions in a window: ((2H - 1)(2W - 1) + extra, heads)."""
    window = getattr(attention, "window_size", None)
    if window is None or value.ndim != len(wanted) or value.shape[-1] != wanted[-1]:
        return None
    height, width = window
    resized = resize_rel_pos_bias_table(value, new_window_size=(height, width), new_bias_shape=tuple(wanted))
    return resized, f"interpolated to windows of {height} x {width}"


def _context(value: Tensor, wanted: torch.Size, offset: int) -> tuple[Tensor, str] | None:
    """Embeddings of the positions of tokens: (offset + positions, C)."""
    if value.ndim != 2 or value.shape[1] != wanted[1] or len(value) <= offset:
        return None
    before, after = len(value) - offset, wanted[0] - offset
    if after < before:
        return value[: wanted[0]], f"the first {after} of {before} positions"
    columns = value[offset:].float().T.unsqueeze(0)
    longer = functional.interpolate(columns, size=after, mode="linear", align_corners=False)
    rows = longer.squeeze(0).T.to(value.dtype)
    return torch.cat([value[:offset], rows]), f"interpolated from {before} to {after} positions"


def _offset(tower: nn.Module, name: str) -> int:
    """The number of rows of a table before position 0: RoBERTa's up to the padding token's, OPT's two."""
    table: Any = tower.get_submodule(name.rpartition(".")[0])
    padding = getattr(table, "padding_idx", None)
    return int(getattr(table, "offset", 0) if padding is None else padding + 1)
