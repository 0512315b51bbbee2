"""Run by test_backward: gradients in float64, on worlds of real processes.

python backward_of_ranks.py OUT SIZE:CASE,CASE …  writes OUT/SIZE-RANK.pt, what each case gave on that rank.
The processes are forked after the imports, before any backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[1]))

from forked import run_worlds, world_over_gloo

from clipcluster.data.loading.batch import Batch
from clipcluster.model.losses import contrastive
from clipcluster.model.norms import group_batch_norms
from clipcluster.model.task import Features, Report, Task
from clipcluster.runtime.devices import seed_step
from clipcluster.runtime.world import World
from clipcluster.train.backward import Backward, Cached, Independent, Whole, _product
from clipcluster.train.optimizer import Optimizer, StageRate
from clipcluster.train.precision import Precision
from clipcluster.train.stages import Stage, Stages
from clipcluster.train.statistics import RunningStatistics
from clipcluster.train.wrapping import WrappedTask

BATCH, SEED, STEP = 24, 5, 7
CPU = torch.device("cpu")
Answer = dict[str, Any]


class Towers(nn.Module):
    """Two small towers; `norm` adds a BatchNorm, over `group` samples, `dropout` random numbers."""

    def __init__(self, norm: bool = False, dropout: float = 0.0, group: int | None = None) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([1.5]))
        self.last = nn.Linear(20, 8)
        self.norm = nn.BatchNorm1d(20) if norm else nn.Identity()
        self.first = nn.Linear(3 * 4 * 4, 20)
        self.words = nn.Embedding(30, 8)
        self.dropout = nn.Dropout(dropout)
        if group:
            group_batch_norms(self, group)

    def image(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.first(images.flatten(1).double() / 255)).relu()
        return functional.normalize(self.last(self.dropout(hidden)), dim=-1)

    def text(self, tokens: Tensor) -> Tensor:
        return functional.normalize(self.words(tokens).mean(1), dim=-1)


class Pairs(Task):
    """A loss over the batch: every other sample is a negative."""

    def __init__(self, model: Towers, world: World) -> None:
        super().__init__()
        self.model, self.world = model, world

    def encode(self, batch: Batch) -> Features:
        return {"image": self.model.image(batch.images), "text": self.model.text(batch.tokens)}

    def loss(self, features: Features) -> Report:
        scale = self.model.logit_scale.exp().squeeze()
        loss, accuracy = contrastive(features["image"], features["text"], scale, self.world)
        return Report(loss, {"loss": loss.detach(), "batch_accuracy": accuracy})


class Classes(Task):
    """A loss that is a mean over samples, with targets among the features."""

    def __init__(self, model: Towers, world: World) -> None:
        super().__init__()
        self.model = model

    def encode(self, batch: Batch) -> Features:
        logits = self.model.image(batch.images) + self.model.text(batch.tokens)
        return {"logits": logits * self.model.logit_scale, "targets": batch.classes}

    def loss(self, features: Features) -> Report:
        loss = functional.cross_entropy(features["logits"], features["targets"])
        return Report(loss, {"loss": loss.detach()})


def part(world: World) -> Batch:
    """This rank's part of one batch of 24."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (BATCH, 3, 4, 4), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(0, 30, (BATCH, 6), generator=generator)
    classes = torch.randint(0, 8, (BATCH,), generator=generator)
    keys = [(slot, "shard", str(slot)) for slot in range(BATCH)]
    batch = Batch(0, images, tokens, torch.ones_like(tokens, dtype=torch.bool), classes, keys)
    size = BATCH // world.size
    return batch.cut(world.rank * size, (world.rank + 1) * size)


class Setup:
    """A task in its wrapping, with what a backward strategy needs."""

    def __init__(self, world: World, kind: type[Task] = Pairs, wrapper: Any = None, **towers: Any) -> None:
        torch.manual_seed(11)
        self.world, self.model = world, Towers(**towers).double()
        self.task = kind(self.model, world)  # type: ignore[call-arg]
        self.wrapped = WrappedTask(self.task, world, wrapper)
        self.statistics = RunningStatistics(self.task, world)
        self.batch = part(world)

    def strategy(self, kind: type[Backward], micro_batches: int = 1) -> Backward:
        slot = self.world.rank * (BATCH // self.world.size)
        precision = Precision("fp32", CPU)
        return kind(
            self.wrapped, precision, self.statistics, seed=SEED, slot=slot, micro_batches=micro_batches
        )

    def run(self, kind: type[Backward], micro_batches: int = 1) -> Answer:
        self.statistics.begin()
        report = self.strategy(kind, micro_batches)(self.batch, STEP)
        self.statistics.commit(torch.zeros(()))
        return self.answer(report)

    def answer(self, report: Report) -> Answer:
        loss = self.world.all_reduce_sum(report.loss.clone()) / self.world.size
        return {
            "loss": loss,
            "requires_grad": report.loss.requires_grad,
            "gradients": {name: _full(p.grad) for name, p in self.task.named_parameters()},
            "buffers": dict(self.model.named_buffers()),
        }


def _full(gradient: Any) -> Any:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def exact(
    kind: type[Task], backward: type[Backward], micro_batches: int, **towers: Any
) -> Callable[[World], Answer]:
    def case(world: World) -> Answer:
        setup = Setup(world, kind, **towers)
        setup.wrapped.wrap()
        return setup.run(backward, micro_batches)

    return case


def sharded(world: World) -> Answer:
    """Under FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world.size,))
    setup = Setup(world, wrapper=lambda task: fully_shard(task, mesh=mesh))
    setup.wrapped.wrap()
    return setup.run(Cached, 4)


def beside_the_wrapper(world: World) -> Answer:
    """Everything on the bare task: nothing is reduced."""
    setup = Setup(world)
    setup.wrapped.wrap()
    report = setup.task.report(setup.batch)
    report.loss.backward()
    return setup.answer(report)


def loss_outside(world: World) -> Answer:
    """Cached, with the loss outside the wrapper: no forward pass that reduces has the scale."""
    setup = Setup(world)
    setup.wrapped.wrap()
    with setup.wrapped.reduction(False):
        cached = setup.strategy(Cached, 4)._features(setup.batch, STEP)  # type: ignore[attr-defined]
        leaves = {name: value.requires_grad_() for name, value in cached.items()}
        report = setup.task.loss(leaves)
        report.loss.backward()
    size = len(setup.batch) // 4
    for number, micro_batch in enumerate(setup.batch.micro_batches(4)):
        own = slice(number * size, (number + 1) * size)
        rows = {name: leaf.grad[own] for name, leaf in leaves.items()}
        with setup.wrapped.reduction(number == 3):
            setup.wrapped(_product, micro_batch, rows, {}).backward()
    return setup.answer(report)


def scale_in_every_micro_batch(world: World) -> Answer:
    """The loss taken again for every micro-batch, its other features from the cache (as OpenCLIP splices)."""
    setup = Setup(world)
    setup.wrapped.wrap()
    strategy = setup.strategy(Cached, 4)
    with setup.wrapped.reduction(False):
        cached = strategy._features(setup.batch, STEP)  # type: ignore[attr-defined]
    size = len(setup.batch) // 4
    for number, micro_batch in enumerate(setup.batch.micro_batches(4)):

        def spliced(task: Task, micro_batch: Batch = micro_batch, number: int = number) -> Report:
            fresh = task.encode(micro_batch)
            rows = slice(number * size, (number + 1) * size)
            features = {name: value.clone() for name, value in cached.items()}
            for name, value in fresh.items():
                features[name][rows] = value
            return task.loss(features)

        with setup.wrapped.reduction(number == 3):
            report = setup.wrapped(spliced)
            report.loss.backward()
    return setup.answer(report)


def other_random_numbers(world: World) -> Answer:
    """The second pass of the cached form seeded by the step alone, not by the micro-batch."""
    import clipcluster.train.backward as module

    setup = Setup(world, dropout=0.5)
    setup.wrapped.wrap()
    draws = iter(range(1000))
    module.seed_step = lambda seed, step, slot: seed_step(seed, step, next(draws))
    try:
        return setup.run(Cached, 4)
    finally:
        module.seed_step = seed_step


def thawed(world: World, *, wrap: bool) -> Answer:
    """The words train from step 3 on; in `Stages`, or (wrong) by their flag alone."""
    setup = Setup(world)
    optimizer = Optimizer(setup.model, lr=0.1, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    frozen = Stage(0, lambda name: None if name == "words.weight" else StageRate())
    stages = Stages(setup.model, setup.wrapped, optimizer, [frozen, Stage(3)])
    stages.enter(0)
    strategy = setup.strategy(Whole)
    strategy.rehearse(setup.batch)
    assert setup.model.words.weight.grad is None
    optimizer.clear()
    if wrap:
        stages.enter(3)
    else:
        setup.model.words.requires_grad_(True)
    return setup.run(Whole)


def scale_alone(world: World) -> Answer:
    """Both towers frozen: only the loss has a parameter that trains."""
    setup = Setup(world)
    setup.model.requires_grad_(False).logit_scale.requires_grad_(True)
    setup.wrapped.wrap()
    passes: list[int] = []
    setup.model.first.register_forward_hook(lambda *_: passes.append(1))
    return {**setup.run(Cached, 4), "passes": len(passes)}


def naive_statistics(world: World) -> Answer:
    """The running statistics left to the passes, as they come."""
    setup = Setup(world, norm=True)
    setup.wrapped.wrap()
    setup.statistics.take = setup.statistics.put_back = lambda: None  # type: ignore[method-assign]
    strategy = setup.strategy(Cached, 4)
    return setup.answer(strategy(setup.batch, STEP))


CASES: dict[str, Callable[[World], Answer]] = {
    "whole": exact(Pairs, Whole, 1),
    "cached": exact(Pairs, Cached, 4),
    "independent": exact(Classes, Independent, 4),
    "classes": exact(Classes, Whole, 1),
    "classes-cached": exact(Classes, Cached, 2),
    "dropout": exact(Pairs, Cached, 4, dropout=0.5),
    "dropout-12": exact(Pairs, Cached, 12, dropout=0.5),
    "norm-1": exact(Pairs, Whole, 1, norm=True),
    "norm-cached-4": exact(Pairs, Cached, 4, norm=True),
    "norm-cached-12": exact(Pairs, Cached, 12, norm=True),
    "groups": exact(Pairs, Whole, 1, norm=True, group=2),
    "groups-cached-2": exact(Pairs, Cached, 2, norm=True, group=2),
    "groups-independent-2": exact(Classes, Independent, 2, norm=True, group=2),
    "groups-classes": exact(Classes, Whole, 1, norm=True, group=2),
    "loss-outside": loss_outside,
    "sharded": sharded,
    "thawed": lambda world: thawed(world, wrap=True),
    "scale-alone": scale_alone,
    "beside-the-wrapper": beside_the_wrapper,
    "scale-in-every-micro-batch": scale_in_every_micro_batch,
    "other-random-numbers": other_random_numbers,
    "thawed-not-wrapped": lambda world: thawed(world, wrap=False),
    "naive-statistics": naive_statistics,
}


def rank(out: Path, number: int, size: int, cases: list[str]) -> None:
    with world_over_gloo(out, number, size) as world:
        answers = {case: CASES[case](world) for case in cases}
        torch.save(answers, out / f"{size}-{number}.pt")


def main() -> int:
    worlds = [world.partition(":") for world in sys.argv[2:]]
    return max(
        run_worlds(rank, Path(sys.argv[1]), [int(size)], cases.split(",")) for size, _, cases in worlds
    )


if __name__ == "__main__":
    sys.exit(main())
