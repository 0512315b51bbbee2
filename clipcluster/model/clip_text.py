"""CLIP's text transformer (Radford et al. 2021, section 2.4), with OpenCLIP's names for the parameters.

SigLIP's (Zhai et al. 2023) is the same network with other options: every token attends to all positions,
padding included, and the features of a caption are those of the last position.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from clipcluster.model.pooling import at, last_of


class ClipTextTower(nn.Module):
    """A pre-norm transformer: (B, L) int64 tokens, (B, L) bool mask -> (B, width).

    The features of a caption are those of its `last` real token, the end token, of its `first` token, or of
    the `last_position` of all L, padding or not. L is at most `positions`; without
    `causal` attention padding is attended to, so that L must be the length that the tower was trained with.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        positions: int,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float,
        quick_gelu: bool = False,
        tanh_gelu: bool = False,
        causal: bool = True,
        pool: Literal["last", "first", "last_position"] = "last",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.width = width
        self.pool = pool
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(positions, width))
        layer = partial(
            _Layer,
            width,
            heads,
            int(width * mlp_ratio),
            activation=_activation(quick_gelu, tanh_gelu),
            causal=causal,
            norm_eps=norm_eps,
        )
        self.transformer = _Layers([layer() for _ in range(layers)], width)
        self.ln_final = nn.LayerNorm(width, eps=norm_eps)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the backward pass recomputes the activations of layers; named as in timm's towers."""
        self.transformer.checkpointing = enable

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        states = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        return self.ln_final(self.transformer(states, self._pooled(mask)))

    def _pooled(self, mask: Tensor) -> Tensor:
        """(B, L) bool -> (B,) int64: the position whose features are each caption's."""
        if self.pool == "last":  # causal attention: padding after it has no influence
            return last_of(mask)
        position = 0 if self.pool == "first" else mask.shape[1] - 1
        return torch.full((mask.shape[0],), position, device=mask.device)


class _Layers(nn.Module):
    """The layers in sequence: (B, L, width) and (B,) int64, the pooled position per row -> (B, width)."""

    def __init__(self, blocks: list[_Layer], width: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)
        self.checkpointing = False
        for layer in blocks:  # the projections into the residual stream
            nn.init.normal_(layer.attn.out_proj.weight, std=(2 * len(blocks) * width) ** -0.5)
            nn.init.normal_(layer.mlp.c_proj.weight, std=(2 * len(blocks) * width) ** -0.5)

    def forward(self, states: Tensor, pooled: Tensor) -> Tensor:
        *early, final = self.resblocks
        for layer in early:
            states = checkpoint(layer, states, use_reentrant=False) if self.checkpointing else layer(states)
        return final(states, pooled)  # the other tokens of the last layer are not used


class _Layer(nn.Module):
    """Attention and MLP, each after a norm and with a residual connection: (B, L, width) -> (B, L, width).

    With `pooled` (B,) int64, the position of a token per row, only these tokens are computed: (B, width).
    """

    def __init__(
        self, width: int, heads: int, hidden: int, *, activation: _Activation, causal: bool, norm_eps: float
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = _Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = _Mlp(width, hidden, activation)

    def forward(self, states: Tensor, pooled: Tensor | None = None) -> Tensor:
        attended = self.attn(self.ln_1(states), pooled)
        states = (states if pooled is None else at(states, pooled)) + attended
        return states + self.mlp(self.ln_2(states))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, activation: _Activation) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)
        self.activation = activation
        nn.init.normal_(self.c_fc.weight, std=(2 * width) ** -0.5)

    def forward(self, states: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(states)))


_Activation = Callable[[Tensor], Tensor]


def _activation(quick: bool, tanh: bool) -> _Activation:
    if tanh:
        return _tanh_gelu
    return _quick_gelu if quick else functional.gelu


def _quick_gelu(values: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximate GELU of OpenAI's models."""
    return values * torch.sigmoid(1.702 * values)


def _tanh_gelu(values: Tensor) -> Tensor:
    return functional.gelu(values, approximate="tanh")


class _Attention(nn.Module):
    """Multi-head attention to all tokens, or, if `causal`, to no later ones; one matrix for q, k and v."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, states: Tensor, pooled: Tensor | None = None) -> Tensor:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        mask = None
        if pooled is None:
            query, key, value = functional.linear(states, weight, bias).chunk(3, -1)
        else:
            width = states.shape[-1]
            query = functional.linear(at(states, pooled).unsqueeze(1), weight[:width], bias[:width])
            key, value = functional.linear(states, weight[width:], bias[width:]).chunk(2, -1)
            if self.causal:
                mask = (torch.arange(states.shape[1], device=pooled.device) <= pooled[:, None])[:, None, None]
        query, key, value = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (query, key, value)
        )
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=self.causal and pooled is None
        )
        joined = self.out_proj(attended.transpose(1, 2).flatten(2))
        return joined if pooled is None else joined.squeeze(1)
