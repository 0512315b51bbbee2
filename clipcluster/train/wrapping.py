"""A task wrapped in DDP or FSDP2: the one way to call it, and the switch of gradient reduction."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from clipcluster.model.task import Task
from clipcluster.runtime.world import World

T = TypeVar("T")
Wrapper = Callable[[Task], nn.Module]


def data_parallel(task: Task) -> nn.Module:
    """DDP around a task. Running statistics are not broadcast: `RunningStatistics` averages them."""
    # It concerns 1x1 convolutions, whose gradients have other strides; no user has to act on it.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # The argument that replaces it does not exist before torch 2.15.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    return DistributedDataParallel(task, broadcast_buffers=False)


class WrappedTask:
    """A task in the wrapper that reduces its gradients over the ranks: DDP by default, none on one rank.

    `wrapped(call, *args)` runs `call(task, *args)` inside the wrapper's `forward`, the only method for which
    a wrapper reduces gradients. Nothing outside this file distinguishes DDP from FSDP2.

    needs_rehearsal: DDP rebuilds its buckets after the first backward pass that it reduces, and from then on
    sums over ranks round differently. One discarded pass after every wrapping makes all real steps alike.
    """

    def __init__(self, task: Task, world: World, wrapper: Wrapper | None = None) -> None:
        self.task = task
        self._wrapper = wrapper or (data_parallel if world.size > 1 else None)
        self._outer: nn.Module = task
        self.needs_rehearsal = False

    def wrap(self) -> None:
        """Wrap the task anew: DDP reduces the parameters that were trainable when it was made."""
        if self._wrapper is None or isinstance(self.task, FSDPModule):
            return
        if self._outer is not self.task:
            self._outer = self.task
            gc.collect()  # the old wrapper holds buckets, and hooks that would reduce a second time
        self._outer = self._wrapper(self.task)
        self.needs_rehearsal = isinstance(self._outer, DistributedDataParallel)

    def __call__(self, call: Callable[..., T], *args: Any) -> T:
        """`call(task, *args)`, run by the wrapper's `forward`."""
        return self._outer(call, *args)

    @contextmanager
    def reduction(self, on: bool) -> Iterator[None]:
        """Whether gradients are reduced over the ranks; a forward and its backward pass go inside."""
        outer = self._outer
        if isinstance(outer, FSDPModule):
            outer.set_requires_gradient_sync(on)
            try:
                yield
            finally:
                outer.set_requires_gradient_sync(True)
        elif isinstance(outer, DistributedDataParallel) and not on:
            with outer.no_sync():
                yield
        else:
            yield
