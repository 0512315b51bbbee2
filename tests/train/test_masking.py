"""Patches left out at random: the cached strategy's second pass leaves out the same ones."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm.layers import PatchDropout
from transformers import AutoConfig

from clipcluster.data.loading.batch import Batch
from clipcluster.model.clip import build_clip
from clipcluster.model.task import ContrastiveTask
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.runtime.devices import seed_step
from clipcluster.runtime.world import World
from clipcluster.train.backward import Cached
from clipcluster.train.precision import Precision
from clipcluster.train.statistics import RunningStatistics
from clipcluster.train.wrapping import WrappedTask

SIZE, LENGTH, BATCH, COUNT, STEP, SEED = 32, 6, 12, 3, 7, 5
TOKENS = SimpleNamespace(vocab_size=40, pad_id=0, eos_id=1, context_length=LENGTH)
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(2, 40, (BATCH, LENGTH), generator=generator)
    return Batch(0, images, tokens, torch.ones_like(tokens).bool(), None, [(0, "", "")] * BATCH)


@pytest.mark.parametrize("library", ["timm", "hf"])
def test_a_cached_steps_gradients_are_those_of_the_same_patches(library: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoConfig.for_model("vit", **VIT, image_size=SIZE, patch_size=8).save_pretrained(tmp_path)
    image = {"timm": "test_vit"} if library == "timm" else {"hf": str(tmp_path)}
    recipe = Recipe.model_validate(
        {
            "name": "masked",
            "data": {"train": [{"shards": "none"}], "batch_size": BATCH, "image": {"size": SIZE}},
            "model": {
                "image": {**image, "mask_ratio": 0.5},
                "text": {"clip": {"width": 16, "layers": 1, "heads": 2}},
                "embed_dim": 8,
            },
            "optim": {"lr": 1.0e-3},
            "train": {"duration": "1 steps"},
        }
    )
    model = build_clip(recipe, TOKENS).double().train()
    world = World(0, 1, 0, torch.device("cpu"))
    task = ContrastiveTask(model, recipe.data.image.mean, recipe.data.image.std, world)
    task.double()
    whole = batch()

    wrapped = WrappedTask(task, world)
    wrapped.wrap()
    statistics = RunningStatistics(task, world)
    statistics.begin()
    precision = Precision("fp32", torch.device("cpu"))
    cached = Cached(wrapped, precision, statistics, seed=SEED, slot=0, micro_batches=COUNT)
    report = cached(whole, STEP)
    found = {name: parameter.grad.clone() for name, parameter in task.named_parameters()}

    task.zero_grad()
    parts = []
    for number, micro_batch in enumerate(whole.micro_batches(COUNT)):
        seed_step(SEED, STEP, number * BATCH // COUNT)
        parts.append(task.encode(micro_batch))
    expected = task.loss({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    expected.loss.backward()
    torch.testing.assert_close(report.loss, expected.loss.detach(), atol=1e-12, rtol=0)
    for name, parameter in task.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-12, rtol=0)

    with torch.no_grad():  # another step leaves out others
        seed_step(SEED, STEP + 1, 0)
        assert not torch.equal(task.encode(whole.cut(0, 4))["image"], parts[0]["image"])
    assert library == "hf" or any(isinstance(module, PatchDropout) for module in model.modules())
