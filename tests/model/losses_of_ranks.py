"""Run by test_losses: each rank's losses and gradients on a world of three real processes, in float64.

python losses_of_ranks.py OUT SIZE  writes OUT/RANK.pt: case -> loss, accuracy and gradients of that rank.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import normalize

sys.path.append(str(Path(__file__).parents[1]))

from forked import run_worlds, world_over_gloo

from clipcluster.model.losses import contrastive, siglip
from clipcluster.runtime.world import World

BATCH, WIDTH, SCALE, BIAS = 12, 5, 7.0, -2.5
CASES = {
    "clip": {},
    "clip-smoothed": {"label_smoothing": 0.2},
    "clip-smoothed-chunks": {"label_smoothing": 0.2, "chunk": 3},
    "siglip": {},
    "siglip-chunks": {"chunk": 3},
}


def features(rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """A rank's part of the features, the scale and the bias, all of them leaves."""
    generator = torch.Generator().manual_seed(4)
    rows = normalize(torch.randn(2, BATCH, WIDTH, generator=generator, dtype=torch.float64), dim=-1)
    image, text = rows[:, rank * BATCH // size : (rank + 1) * BATCH // size]
    found = {"image": image, "text": text, "scale": torch.tensor(SCALE), "bias": torch.tensor(BIAS)}
    return {name: value.detach().to(dtype).clone().requires_grad_() for name, value in found.items()}


def answer(case: str, world: World, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Loss, accuracy and gradients of a case; the bias has none in clip."""
    given = features(world.rank, world.size, dtype)
    if case.startswith("siglip"):
        loss, accuracy = siglip(*given.values(), world, **CASES[case])
    else:
        loss, accuracy = contrastive(given["image"], given["text"], given["scale"], world, **CASES[case])
    loss.backward()
    gradients = {name: value.grad for name, value in given.items() if value.grad is not None}
    return {"loss": loss.detach(), "accuracy": accuracy, "gradients": gradients}


def open_clip_losses() -> ModuleType | None:
    """OpenCLIP's module of losses without the rest of it, where it is installed."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        return None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(case: str, module: ModuleType, world: World) -> dict[str, Any]:
    """OpenCLIP's loss and gradients, exact over ranks as it can be set."""
    given = features(world.rank, world.size)
    if case == "siglip":
        loss = module.SigLipLoss(rank=world.rank, world_size=world.size)(*given.values())
    else:
        kind = module.ClipLoss(local_loss=True, gather_with_grad=True, rank=world.rank, world_size=world.size)
        loss = kind(given["image"], given["text"], given["scale"])
    loss.backward()
    gradients = {name: value.grad for name, value in given.items() if value.grad is not None}
    return {"loss": loss.detach(), "gradients": gradients}


def rank(out: Path, number: int, size: int) -> None:
    with world_over_gloo(out, number, size) as world:
        answers = {case: answer(case, world) for case in CASES}
        module = open_clip_losses()
        if module is not None:
            answers |= {f"open_clip {case}": theirs(case, module, world) for case in ("clip", "siglip")}
        torch.save(answers, out / f"{number}.pt")


if __name__ == "__main__":
    sys.exit(run_worlds(rank, Path(sys.argv[1]), [int(sys.argv[2])]))
