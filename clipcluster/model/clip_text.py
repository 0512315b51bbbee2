"""CLIP's text transformer (Radford et al. 2021, section 2.4), with the parameter names of OpenCLIP's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from clipcluster.model.pooling import at, last_of


class ClipTextTower(nn.Module):
    """A causal, pre-norm transformer: (B, L) int64 tokens, (B, L) bool mask -> (B, width).

    The vector of a caption is that of its last real token, which ends it; L is at most `positions`.
    """

    pool = "last"

    def __init__(
        self,
        *,
        vocab_size: int,
        positions: int,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float,
        quick_gelu: bool,
    ) -> None:
        super().__init__()
        self.width = width
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(positions, width))
        self.transformer = _Layers(width, layers, heads, int(width * mlp_ratio), quick_gelu)
        self.ln_final = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether a layer's activations are computed again in the backward pass, as timm's towers have it."""
        self.transformer.checkpointing = enable

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        states = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        # Causal: what follows the last real token never reaches it.
        return self.ln_final(self.transformer(states, last_of(mask)))


class _Layers(nn.Module):
    """The layers, one after another: (B, L, width) and the place of a token in each row -> (B, width)."""

    def __init__(self, width: int, layers: int, heads: int, hidden: int, quick_gelu: bool) -> None:
        super().__init__()
        blocks = [_Layer(width, heads, hidden, quick_gelu) for _ in range(layers)]
        self.resblocks = nn.ModuleList(blocks)
        self.checkpointing = False
        for layer in blocks:  # what writes into the residual stream shrinks with depth
            nn.init.normal_(layer.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(layer.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)

    def forward(self, states: Tensor, last: Tensor) -> Tensor:
        *early, final = self.resblocks
        for layer in early:
            states = checkpoint(layer, states, use_reentrant=False) if self.checkpointing else layer(states)
        return final(states, last)  # the other tokens of the last layer are not used


class _Layer(nn.Module):
    """Attention and MLP, each after a norm and added to what came in: (B, L, width) -> (B, L, width).

    With the place of a token in each row, (B,): the vectors of these alone, (B, width).
    """

    def __init__(self, width: int, heads: int, hidden: int, quick_gelu: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = _CausalAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = _Mlp(width, hidden, quick_gelu)

    def forward(self, states: Tensor, last: Tensor | None = None) -> Tensor:
        attended = self.attn(self.ln_1(states), last)
        states = (states if last is None else at(states, last)) + attended
        return states + self.mlp(self.ln_2(states))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, quick_gelu: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)
        self.activation = _quick_gelu if quick_gelu else functional.gelu
        nn.init.normal_(self.c_fc.weight, std=(2 * width) ** -0.5)

    def forward(self, states: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(states)))


def _quick_gelu(values: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the GELU of OpenAI's models."""
    return values * torch.sigmoid(1.702 * values)


class _CausalAttention(nn.Module):
    """Each token attends to itself and those before it; queries, keys and values are one matrix."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, states: Tensor, last: Tensor | None = None) -> Tensor:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if last is None:
            query, key, value = functional.linear(states, weight, bias).chunk(3, -1)
            mask = None
        else:
            width = states.shape[-1]
            query = functional.linear(at(states, last).unsqueeze(1), weight[:width], bias[:width])
            key, value = functional.linear(states, weight[width:], bias[width:]).chunk(2, -1)
            mask = (torch.arange(states.shape[1], device=last.device) <= last[:, None])[:, None, None]
        query, key, value = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (query, key, value)
        )
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None
        )
        joined = self.out_proj(attended.transpose(1, 2).flatten(2))
        return joined if last is None else joined.squeeze(1)
