"""The task of a recipe: what a step computes, and how the ranks share its gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipcluster.runtime.world import World


def wrapped(task: Any, world: World) -> Any:
    """The task under DDP where there are peers."""
    if world.size == 1:
        return task
    import warnings

    from torch.nn.parallel import DistributedDataParallel

    # Said of 1x1 convolutions whose gradient comes with another stride: a copy, and no matter for a user.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(task)
