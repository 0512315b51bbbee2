"""Batch norms: kept in float32 under autocast, or over the batch of all ranks."""

from __future__ import annotations

from typing import Any

from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipcluster.errors import UserError
from clipcluster.model.losses import widen
from clipcluster.runtime.world import World


class _InFloat32:
    """Put before a batch norm's class: its input is cast to float32, its output back to the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(widen(x)).to(x.dtype)  # type: ignore[misc]


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms of a model, of whatever kind."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def keep_in_float32(model: nn.Module) -> int:
    """Let every batch norm compute in float32 under autocast, whatever kernel it has; returns how many.

    Names, parameters and kinds stay: only `forward` is wrapped, by a subclass of each norm's own class.
    """
    found = batch_norms(model)
    for norm in found:
        kind = type(norm)
        if not issubclass(kind, _InFloat32):
            norm.__class__ = type(f"{kind.__name__}InFloat32", (_InFloat32, kind), {})
    return len(found)


def synchronise(model: Any, world: World) -> None:
    """Let the statistics of every batch norm be those of all ranks' samples (torch's SyncBatchNorm).

    Names and parameters stay. On one rank nothing changes. Raises UserError for several ranks on the CPU,
    where torch has no such kernel.
    """
    if world.size == 1 or not batch_norms(model):
        return
    if world.device.type == "cpu":
        raise UserError(
            f"train.sync_batch_norm: torch's SyncBatchNorm does not run on the CPU, and this run has "
            f"{world.size} ranks there. Set it to false, or choose a tower without batch norms."
        )
    convert_sync_batchnorm(model)
