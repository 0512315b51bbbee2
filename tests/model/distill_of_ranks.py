"""Run by test_distill: one step of distillation on each of several worlds of real processes, in float64.

python distill_of_ranks.py OUT SIZE …  writes OUT/SIZE-NAME.pt for every case of `CASES`: loss and gradients.
The processes are forked after the imports, before any backward pass.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))

from forked import run_worlds, world_over_gloo
from tiny_model import tiny_batch, tiny_clip

from clipcluster.data.loading import stored
from clipcluster.data.loading.batch import Batch
from clipcluster.model.distill import DistillTask, Teacher
from clipcluster.model.task import ContrastiveTask
from clipcluster.model.weight_files import PROJECTIONS
from clipcluster.recipe.sections.distill import Distill
from clipcluster.runtime.world import World
from clipcluster.train.backward import Cached, Whole
from clipcluster.train.precision import Precision
from clipcluster.train.statistics import RunningStatistics
from clipcluster.train.wrapping import WrappedTask

BATCH, WIDTHS, SCALE = 6, (5, 7), 20.0
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
CPU = torch.device("cpu")
STORED = {"widths": WIDTHS, "scale": SCALE}
TEACHERS = {"teachers": [{"run": "a"}, {"run": "b"}]}  # whose models are made here
FEATURES = {"contrastive": 1.0, "feature_mse": 20.0, "feature_cosine": 0.5}
CASES: dict[str, tuple[dict[str, Any], bool, int]] = {
    # the section distill, whether there are synthetic captions, micro-batches
    "published": ({"stored": STORED}, True, 1),
    "mixed": ({"stored": STORED, "weight": 0.75}, True, 2),
    "drawn": ({"stored": STORED, "weight": 0.5, "contrastive": 2.0}, False, 1),
    "stored features": ({"stored": STORED, **FEATURES}, True, 2),
    "models": ({**TEACHERS, **FEATURES}, False, 1),
    "models, cached": ({**TEACHERS, **FEATURES}, False, 2),
    "image features alone": ({**TEACHERS, **FEATURES, "weight": 0, "feature_mse": 0}, False, 1),
}
PIXELS = ((32, MEAN, STD), (48, (0.4, 0.4, 0.4), (0.3, 0.3, 0.3)))  # of each model that teaches
OWN_TOKENS = ("teacher-1-tokens", "teacher-1-mask")


def student() -> Any:
    return tiny_clip().double()


def teacher(number: int) -> Any:
    """The first has the student's width, the second another, another scale, pixels and tokens."""
    model = tiny_clip(seed=20 + number, embed_dim=(8, 5)[number], size=(32, 48)[number])
    return model.double()


def teachers() -> list[Teacher]:
    found = []
    for number, (size, mean, std) in enumerate(PIXELS):
        own = OWN_TOKENS if number else None
        scale = 30.0 if number else None
        found.append(Teacher(teacher(number), size=size, mean=mean, std=std, tokens=own, scale=scale))
    return found


def projections(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of the student's projections, trainable, in a world of one: side-teacher -> (D, 8)."""
    alone = ContrastiveTask(student(), MEAN, STD, World(0, 1, 0, CPU))
    models = teachers() if "teachers" in settings else []
    model = DistillTask(alone, Distill.model_validate(settings), models).double().model
    found = getattr(model, PROJECTIONS, {})
    return {name: found[name].weight for name in found}


def halves(count: int, seed: int) -> torch.Tensor:
    """(count, 12) float64: two teachers' embeddings of length one, side by side."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(count, width, generator=generator, dtype=torch.float64) for width in WIDTHS]
    return torch.cat([torch.nn.functional.normalize(part) for part in parts], dim=1)


def batch_of_all(synthetic: bool) -> Batch:
    own, other = tiny_batch(BATCH), tiny_batch(BATCH, seed=1)
    extras: dict[str, Any] = {stored.IMAGE: halves(BATCH, 2), stored.TEXT: halves(BATCH, 3)}
    if synthetic:
        extras |= {stored.SYNTHETIC_TEXT: halves(BATCH, 4), stored.TOKENS: other.tokens}
        extras |= {stored.MASK: other.mask}
    extras |= dict(zip(OWN_TOKENS, (other.tokens, other.mask), strict=True))
    keys = [(slot, "shard", str(slot)) for slot in range(BATCH)]
    return Batch(0, own.images, own.tokens, own.mask, None, keys, extras=extras)


def step(world: World, settings: dict[str, Any], synthetic: bool, micro_batches: int) -> dict[str, Any]:
    alone = ContrastiveTask(student(), MEAN, STD, world)
    models = teachers() if "teachers" in settings else []
    task = DistillTask(alone, Distill.model_validate(settings), models).double()
    wrapped = WrappedTask(task, world)
    wrapped.wrap()
    statistics = RunningStatistics(task, world)
    size = BATCH // world.size
    backward = (Whole if micro_batches == 1 else Cached)(
        wrapped, Precision("fp32", CPU), statistics,
        seed=0, slot=world.rank * size, micro_batches=micro_batches,
    )  # fmt: skip
    statistics.begin()
    report = backward(batch_of_all(synthetic).cut(world.rank * size, (world.rank + 1) * size), 0)
    loss = world.all_reduce_sum(report.loss.clone()) / world.size
    gradients = {name: parameter.grad for name, parameter in task.named_parameters()}
    return {"loss": loss, "gradients": gradients, "metrics": report.metrics}


def run(out: Path, rank: int, size: int) -> None:
    with world_over_gloo(out, rank, size) as world:
        for name, case in CASES.items():
            answer = step(world, *case)
            if rank == 0:
                torch.save(answer, out / f"{size}-{name}.pt")


if __name__ == "__main__":
    sys.exit(run_worlds(run, Path(sys.argv[1]), [int(size) for size in sys.argv[2:]]))
