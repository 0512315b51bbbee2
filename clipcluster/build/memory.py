"""How much memory a training step of a recipe takes on a device: a step is traced, and nothing computed.

The step runs on tensors without content (torch's FakeTensor, whose operators are those of the meta device),
so that every tensor that would be alive is seen with its size, and none is allocated.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipcluster.build.data import Sources, open_batches, open_sources
from clipcluster.build.model import build_model
from clipcluster.build.training import assemble_step, ready_task
from clipcluster.data.loading.batch import COLUMNS, Batch
from clipcluster.model.task import Task
from clipcluster.recipe.plan import Plan, plan
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.runtime.world import World
from clipcluster.train.backward import Cached, differentiate
from clipcluster.train.progress import Progress
from clipcluster.train.stages import counts_of
from clipcluster.train.step import Step

T = TypeVar("T")
WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
AVERAGE, ACTIVATIONS = "average", "activations"
FEW_SAMPLES = 2  # a pair can be mixed
TRACED = 2  # micro-batches at most: the first begins without gradients, each later one is like the second
KINDS = (WEIGHTS, GRADIENTS, OPTIMIZER, AVERAGE, ACTIVATIONS)
LOGIT_COPIES = 4  # of a rank's logits at the peak of a contrastive loss: two kept, two of the backward pass


@dataclass(frozen=True)
class Estimate:
    """What a step takes at its peak, in bytes on one device by kind, and what a checkpoint holds.

    Tensors alone: the driver, libraries, caches of the allocator and other processes come on top.
    """

    bytes: dict[str, int]
    parameters: int
    trainable: int  # in the stage that trains most
    checkpoint: int  # bytes of its tensors


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, by kind: `now`, and at the `peak` of their sum.

    Counted is the memory behind tensors, so that views cost nothing. New tensors are activations until
    `count` says otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._kinds: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.count(func(*args, **(kwargs or {})), ACTIVATIONS)

    def count(self, values: T, kind: str) -> T:
        """Count the tensors among `values` (of any nesting) as of this kind; returns the values."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), kind)
        return values

    def _count(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size = id(storage), storage.nbytes()
        before = self._kinds.get(key)
        if before is None:
            weakref.finalize(storage, self._gone, key, size)
        elif before != ACTIVATIONS or kind == ACTIVATIONS:
            return
        else:
            self.now[before] -= size
        self._kinds[key] = kind
        self.now[kind] += size
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def _gone(self, key: int, size: int) -> None:
        self.now[self._kinds.pop(key)] -= size

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now.copy()


def estimate(recipe: Recipe, assets: Path | None, world_size: int = 1) -> Estimate:
    """The memory of a step of the run on `world_size` ranks, in the stage that trains most.

    The model is built (its weights are not read), and one small batch is read for the shapes of its tensors.
    Raises UserError and DataError as building and reading do, and whatever a tower raises that cannot be
    traced, because its computation depends on the content of tensors.
    """
    recipe = _traceable(recipe)
    few = recipe.data.model_copy(update={"batch_size": FEW_SAMPLES, "workers": 0})
    small = recipe.model_copy(update={"data": few})
    sources = open_sources(small, assets)
    plan_ = plan(recipe, sources.sampler.samples, world_size)
    world = World(0, 1, 0, torch.device("cpu"))
    model = build_model(recipe, sources.tokenizer, assets, starting_weights=False)
    task, precision = ready_task(recipe, model, world, assets)
    batch = _first_batch(small, sources, world)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Live() as live:
        task._apply(lambda tensor: live.count(fake.from_tensor(tensor), WEIGHTS))  # those of teachers too
        part = _few_micro_batches(plan_)
        step = assemble_step(recipe, part, model, task, precision, world)
        stage = max(step.stages.stages, key=lambda one: counts_of(model.named_parameters(), one).trainable)
        step.stages.enter(stage.start)
        progress = Progress(steps_per_epoch=plan_.steps_per_epoch, batch_size=plan_.batch_size)
        progress.step = stage.start
        filled = _filled(batch, part.per_rank_batch)
        peak = _peak_of(step, live, filled, progress)
        if part != plan_:
            peak = _of_all_samples(peak, step, live, filled, plan_)
        saved = [model.state_dict(), step.ema.state_dict() if step.ema else {}, step.optimizer.state_tensors]
        checkpoint = _bytes(saved)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = {kind: peak[kind] for kind in KINDS}
    parts[ACTIVATIONS] += _others_logits(recipe, plan_)
    if world_size > 1:  # DDP's buckets, beside the gradients
        parts[GRADIENTS] += sum(parameter.nbytes for parameter in trained)
    count = sum(parameter.numel() for parameter in model.parameters())
    return Estimate(parts, count, sum(parameter.numel() for parameter in trained), checkpoint)


def _traceable(recipe: Recipe) -> Recipe:
    """The recipe without what cannot be traced on the CPU, nor changes what is in the device's memory."""
    changes: dict[str, Any] = {"compile": False, "sync_batch_norm": False}
    if recipe.train.precision == "fp16":
        changes["precision"] = "bf16"  # as large, and without a loss scale
    if recipe.train.ema and recipe.train.ema.device == "cpu":
        changes["ema"] = None
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def _first_batch(recipe: Recipe, sources: Sources, world: World) -> Batch:
    batches = open_batches(recipe, sources, world, 0, ())
    try:
        return next(iter(batches))
    finally:
        batches.close()


def _filled(small: Batch, count: int) -> Batch:
    """A batch of `count` samples with the shapes of a small one."""

    def rows(values: Any) -> Any:
        if isinstance(values, Tensor):
            return torch.empty((count, *values.shape[1:]), dtype=values.dtype)
        return values and [values[number % len(values)] for number in range(count)]

    columns: dict[str, Any] = {name: rows(getattr(small, name)) for name in COLUMNS}
    extras = {name: rows(values) for name, values in small.extras.items()}
    return replace(small, **columns, extras=extras, keys=rows(small.keys), bad=[])


def _few_micro_batches(plan_: Plan) -> Plan:
    """The plan with no more micro-batches than differ: to trace one takes seconds."""
    count = min(plan_.accumulation, TRACED)
    return replace(plan_, accumulation=count, per_rank_batch=count * plan_.micro_batch)


def _of_all_samples(peak: Counter[str], step: Step, live: Live, part: Batch, plan_: Plan) -> Counter[str]:
    """The peak with all samples of a rank, from that of a step over a `part` of them.

    They are in memory as they are read. Where features are cached, those of all samples and their gradients
    are too, and the loss over all of them may take more than a micro-batch.
    """
    samples, size = plan_.per_rank_batch, plan_.micro_batch
    more = samples - len(part)
    columns = [getattr(part, name) for name in COLUMNS] + list(part.extras.values())
    inputs = more * _bytes(columns) // len(part)
    peak[ACTIVATIONS] += inputs
    if not isinstance(step.backward, Cached):
        return peak
    task = step.backward.task
    with torch.no_grad(), step.backward.precision.autocast():
        few = task(Task.features, part.cut(0, size))
    peak[ACTIVATIONS] += 2 * more * _bytes(list(few.values())) // size
    every = {name: value.new_empty((samples, *value.shape[1:])) for name, value in few.items()}
    step.optimizer.clear()
    live.restart()
    task(differentiate, every, step.backward.precision)
    live.peak[ACTIVATIONS] += inputs
    return max(peak, live.peak, key=Counter.total)


def _bytes(values: Any) -> int:
    """Bytes of the tensors among the values."""
    return sum(leaf.nbytes for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _peak_of(step: Step, live: Live, batch: Batch, progress: Progress) -> Counter[str]:
    """The bytes by kind at the peak of a step that follows earlier ones, whose optimizer has its state."""
    live.count(step.optimizer.state_tensors, OPTIMIZER)
    if step.ema:
        live.count(step.ema.state_dict(), AVERAGE)

    def count_gradient(parameter: Tensor) -> None:
        live.count(parameter.grad, GRADIENTS)

    for parameter in step.backward.task.task.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(count_gradient)
    before = len(step.optimizer.state_tensors)
    live.restart()
    step(batch, progress)
    peak = live.peak
    if len(step.optimizer.state_tensors) > before:  # an optimizer that makes its state in the first update
        live.count(step.optimizer.state_tensors, OPTIMIZER)
        step.optimizer.clear()
        live.restart()
        step.backward.statistics.begin()
        step.backward(batch, progress.step)
        peak = max(peak, live.peak, key=Counter.total)
    return peak


def _others_logits(recipe: Recipe, plan_: Plan) -> int:
    """Bytes of a rank's logits with the samples of the other ranks, which the trace of one rank has not."""
    if TASKS[recipe.task].loss_over != "batch" or recipe.loss.name == "siglip":  # siglip: one rank at a time
        return 0
    rows = min(recipe.loss.chunk or plan_.per_rank_batch, plan_.per_rank_batch)
    return LOGIT_COPIES * 4 * rows * (plan_.batch_size - plan_.per_rank_batch)
