"""Batch norms: in float32 under autocast, over groups of samples, or over the micro-batches of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from clipcluster.errors import UserError
from clipcluster.model.losses import widen
from clipcluster.runtime.world import World


class _InFloat32:
    """A mixin for a class of batch norms: the input is cast to float32, the output to the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(widen(x)).to(x.dtype)  # type: ignore[misc]


class _InGroups:
    """A mixin for a class of batch norms: in training the statistics are those of `group` rows at a time.

    The new running statistics are the mean of what each group alone would have made of the old ones. In
    evaluation nothing differs. timm's class includes dropout and activation, which see all rows at once.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)  # type: ignore[misc]
        parts = x.split(self.group)
        # A copy for each group, which starts from the old values and is unchanged until its backward pass.
        old = (self.running_mean, self.running_var)
        moved = [(old[0].clone(), old[1].clone()) for _ in parts]
        x = torch.cat(
            [
                functional.batch_norm(part, *own, self.weight, self.bias, True, self.momentum, self.eps)
                for part, own in zip(parts, moved, strict=True)
            ]
        )
        for buffer, new in zip(old, zip(*moved, strict=True), strict=True):
            buffer.copy_(torch.stack(new).mean(dim=0))
        self.num_batches_tracked.add_(1)
        return self.act(self.drop(x)) if isinstance(self, BatchNormAct2d) else x


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms of a model, of every class."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def keep_in_float32(model: nn.Module) -> int:
    """Make every batch norm compute in float32 under autocast, whatever its kernel. Returns how many.

    Names and parameters stay: each norm gets a subclass of its own class, which wraps `forward`.
    """
    found = batch_norms(model)
    for norm in found:
        kind = type(norm)
        if not issubclass(kind, _InFloat32):
            norm.__class__ = type(f"{kind.__name__}InFloat32", (_InFloat32, kind), {})
    return len(found)


def group_batch_norms(model: nn.Module, group: int) -> None:
    """Make every batch norm normalise `group` samples at a time in training; names and parameters stay.

    Call it before `keep_in_float32`. Raises UserError for a class of batch norms that cannot.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)
    for norm in batch_norms(model):
        kind = type(norm)
        if kind not in kinds or norm.running_mean is None or norm.momentum is None:
            raise UserError(
                f"train.batch_norm_group: {kind.__name__} without running statistics, or of a kind unknown "
                "here, cannot normalise in groups; remove the key, or choose another tower"
            )
        norm.__class__ = type(f"{kind.__name__}InGroups", (_InGroups, kind), {"group": group})


@torch.no_grad()
def require_a_row_a_sample(tower: nn.Module, images: Tensor) -> None:
    """UserError for a tower with a batch norm whose rows are not samples but tokens or windows (LeViT).

    images: (b, 3, S, S) float, for one forward pass in evaluation mode; the modules' modes are restored.
    """
    rows: dict[str, int] = {}
    modes = [(module, module.training) for module in tower.modules()]
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: rows.update({name: len(given[0])}))
        for name, module in tower.named_modules()
        if isinstance(module, _BatchNorm)
    ]
    try:
        tower.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    for name, count in rows.items():
        if count != len(images):
            raise UserError(
                f"train.batch_norm_group: the batch norm {name} sees {count} rows for {len(images)} images "
                "(tokens, or windows), and cannot group them by samples; remove the key, or choose another "
                "tower"
            )


def synchronise(model: Any, world: World) -> None:
    """Make the statistics of every batch norm those of the samples of all ranks (torch's SyncBatchNorm).

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
