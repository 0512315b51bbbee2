"""What freezing layers saves: the operations of the backward pass, and the memory kept for it.

python tests/build/measure_freezing.py  prints the table of docs/training.md, "Stages": ConvNeXt V2 Tiny and
GPT-2 with random weights, 4 samples of 224 pixels and 77 tokens, float32, on the CPU. Operations are those
that torch's FlopCounterMode counts; memory is that of the tensors saved by autograd, each storage once,
without parameters. Neither depends on the machine. It takes a minute and 4 GB.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config

from clipcluster.build.stages import build_stages
from clipcluster.model.clip import Clip, build_clip
from clipcluster.model.losses import contrastive
from clipcluster.recipe.sections.image import Image
from clipcluster.recipe.stages import Freezing
from clipcluster.runtime.world import World
from clipcluster.train.stages import Stage

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "model"))
from tiny_model import Tokens, image_section, model_section, text_section

SAMPLES, SIZE, LENGTH = 4, 224, 77
FREEZE = [("image", 0, 0), ("text", 0, 0), ("text", 1, 6), ("image", 2, 4)]  # tower, step, last layers
NAMES = ("projections", "and text's last 6", "and image's last 4")


def model_of(folder: Path) -> Clip:
    """The two towers with a joint space of 512 dimensions."""
    settings = GPT2Config()
    settings.save_pretrained(folder)
    end = settings.eos_token_id
    tokens = Tokens(vocab_size=settings.vocab_size, pad_id=end, eos_id=end, context_length=LENGTH)
    text = text_section(None, hf=str(folder), config={}, pool="mean")
    section = model_section(image=image_section("convnextv2_tiny"), text=text, embed_dim=512)
    return build_clip(SimpleNamespace(model=section, data=SimpleNamespace(image=Image(size=SIZE))), tokens)


def measure(model: Clip, stage: Stage) -> tuple[float, float, float]:
    """GFLOP of the forward pass and of the backward pass, and MiB kept in between."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = stage.rate_of(name) is not None
        parameter.grad = None
    for name, module in model.named_modules():
        module.training = name not in stage.eval_modules
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    images = torch.randn(SAMPLES, 3, SIZE, SIZE)
    tokens = torch.randint(0, 50257, (SAMPLES, LENGTH))
    alone = World(0, 1, 0, torch.device("cpu"))
    with (
        FlopCounterMode(display=False) as forward,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
    ):
        features = model.encode_image(images), model.encode_text(tokens, torch.ones_like(tokens).bool())
        loss, _ = contrastive(*features, model.logit_scale.exp().squeeze(), alone)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops() / 1e9, backward.get_total_flops() / 1e9, sum(kept.values()) / 2**20


def main() -> None:
    rest = {"lr_scale": 1.0, "warmup": 0, "moving_statistics": False, "norms_train": False}
    entries = [Freezing(f"freeze.{n}", *entry, **rest) for n, entry in enumerate(FREEZE)]
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(Path(folder))
    named = zip(("all", *NAMES), (Stage(), *build_stages(model, entries)), strict=True)
    print("| what trains | parameters | backward pass, GFLOP | kept for it, MiB |\n|---|---|---|---|")
    for name, stage in named:
        forward, backward, kept = measure(model, stage)
        numbers = sum(p.numel() for own, p in model.named_parameters() if stage.rate_of(own) is not None)
        print(f"| {name} | {numbers:,} | {backward:.2f} | {kept:,.1f} |", flush=True)
    print(f"forward pass: {forward:.1f} GFLOP")


if __name__ == "__main__":
    main()
