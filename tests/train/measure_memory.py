"""Peak memory of a training step: by batch and micro-batch, activations computed again, and of the losses.

python tests/train/measure_memory.py  prints the tables of docs/benchmarks.md. Each figure is the largest
resident size of a process of its own (getrusage) above what it was before the step. It takes a few minutes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "model"))
STEPS = [
    {"batch": 128},
    {"batch": 256},
    {"batch": 512},
    {"batch": 128, "micro_batch": 32},
    {"batch": 256, "micro_batch": 32},
    {"batch": 512, "micro_batch": 32},
    {"batch": 512, "micro_batch": 64},
    {"batch": 512, "micro_batch": 128},
    {"batch": 256, "checkpointing": True},
]
LOSSES = [
    {"loss": name, "rows": 8192, **({"chunk": chunk} if chunk else {})}
    for name in ("clip", "siglip")
    for chunk in (None, 1024, 128)
]


def peak() -> float:
    """The largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step(batch: int, micro_batch: int | None = None, checkpointing: bool = False) -> dict[str, float]:
    """One forward and backward pass of a ConvNeXt and a GPT-2 at 64 pixels."""
    import torch
    from tiny_model import image_section, text_section, tiny_clip

    from clipcluster.data.loading.batch import Batch
    from clipcluster.model.activation_checkpointing import checkpoint_activations
    from clipcluster.model.task import ContrastiveTask
    from clipcluster.runtime.world import World
    from clipcluster.train.backward import Cached, Whole
    from clipcluster.train.precision import Precision
    from clipcluster.train.statistics import RunningStatistics
    from clipcluster.train.wrapping import WrappedTask

    world = World(0, 1, 0, torch.device("cpu"))
    text = text_section(config={"n_layer": 2, "n_embd": 64, "n_head": 2})
    model = tiny_clip(image=image_section("convnext_atto"), text=text)
    if checkpointing:
        checkpoint_activations(model)
    task = ContrastiveTask(model, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), world)
    images = torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8)
    tokens = torch.randint(2, 40, (batch, 12))
    samples = Batch(0, images, tokens, torch.ones_like(tokens, dtype=torch.bool), None, [(0, "", "")] * batch)
    strategy = (Cached if micro_batch else Whole)(
        WrappedTask(task, world),
        Precision("fp32", world.device),
        RunningStatistics(task, world),
        seed=0,
        slot=0,
        micro_batches=batch // (micro_batch or batch),
    )

    def run(part: Batch) -> float:
        began = time.perf_counter()
        strategy.statistics.begin()
        strategy(part, 0)
        return time.perf_counter() - began

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = peak()
    seconds = run(samples)
    return {"MB": peak() - before, "seconds": seconds}


def loss(loss: str, rows: int, chunk: int | None = None) -> dict[str, float]:
    """Value and gradients of a loss of so many pairs."""
    import torch
    from torch.nn.functional import normalize

    from clipcluster.model.losses import contrastive, siglip
    from clipcluster.runtime.world import World

    image, text = (normalize(torch.randn(rows, 512)).requires_grad_() for _ in range(2))
    world, scale = World(0, 1, 0, torch.device("cpu")), torch.tensor(14.0, requires_grad=True)
    before, began = peak(), time.perf_counter()
    if loss == "clip":
        value, _ = contrastive(image, text, scale, world, chunk=chunk)
    else:
        value, _ = siglip(image, text, scale, torch.tensor(-10.0, requires_grad=True), world, chunk=chunk)
    value.backward()
    return {"MB": peak() - before, "seconds": time.perf_counter() - began}


def alone(what: str, given: dict[str, Any]) -> dict[str, float]:
    """A measurement in a process of its own."""
    command = [sys.executable, __file__, what, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    if len(sys.argv) == 3:
        measure = {"step": step, "loss": loss}[sys.argv[1]]
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return
    for what, cases in (("step", STEPS), ("loss", LOSSES)):
        for given in cases:
            found = alone(what, given)
            words = ", ".join(f"{name} {value}" for name, value in given.items())
            print(f"| {words} | {found['MB']:,.0f} MB | {found['seconds']:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
