"""Activations computed again: the same gradients and random numbers, less kept, statistics moved once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_model import image_section, text_section, tiny_batch, tiny_clip
from torch import nn

from clipcluster.errors import UserError
from clipcluster.model.activation_checkpointing import checkpoint_activations
from clipcluster.model.clip_text import ClipTextTower
from clipcluster.model.task import ContrastiveTask
from clipcluster.runtime.devices import seed_step
from clipcluster.runtime.world import World
from clipcluster.train.backward import Whole
from clipcluster.train.precision import Precision
from clipcluster.train.statistics import RunningStatistics
from clipcluster.train.wrapping import WrappedTask

ALONE = World(0, 1, 0, torch.device("cpu"))
GPT2 = text_section(config={"n_layer": 2, "n_embd": 16, "n_head": 2})  # with dropout
BERT = text_section("bert")


def trained_once(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """Gradients and buffers after a pass with dropout, and how many bytes were kept for the backward pass."""
    model = model.double().train()
    task = ContrastiveTask(model, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), ALONE).double()
    statistics = RunningStatistics(task, ALONE)
    backward = Whole(WrappedTask(task, ALONE), Precision("fp32", ALONE.device), statistics, seed=1, slot=0)
    kept: list[int] = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.numel() * value.element_size())
        return value

    statistics.begin()
    seed_step(1, 3, 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        task.report(tiny_batch(6))
    bytes_kept = sum(kept)
    statistics.put_back()
    backward(tiny_batch(6), 3)
    statistics.commit(torch.zeros(()))
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return gradients, dict(model.named_buffers()), bytes_kept


@pytest.mark.parametrize(
    ("timm", "text"), [("test_vit", GPT2), ("test_resnet", BERT), ("test_efficientnet", GPT2)]
)
def test_gradients_are_the_same_and_less_is_kept(timm: str, text: Any) -> None:
    plain = tiny_clip(image=image_section(timm, drop_path_rate=0.3), text=text)
    saving = copy.deepcopy(plain)
    checkpoint_activations(saving)
    expected, buffers, kept = trained_once(plain)
    found, also, less = trained_once(saving)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-12 * gradient.norm() + 1e-15, name
    for name, value in buffers.items():
        torch.testing.assert_close(also[name], value, rtol=0, atol=1e-14)  # moved once
    assert less < 0.8 * kept


def test_clips_text_transformer_can() -> None:
    torch.manual_seed(0)
    tower = ClipTextTower(
        vocab_size=40, positions=12, width=16, layers=2, heads=2, mlp_ratio=4.0, quick_gelu=False
    ).double()
    saving = copy.deepcopy(tower)
    checkpoint_activations(saving)
    batch = tiny_batch(4)
    for each in (tower, saving):
        each(batch.tokens, batch.mask).square().sum().backward()
    for (name, value), other in zip(tower.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-12, atol=1e-12, msg=name)


def test_a_tower_that_cannot_is_named() -> None:
    with pytest.raises(
        UserError, match=r"train.activation_checkpointing: the tower image does not support it"
    ):
        checkpoint_activations(tiny_clip(image=image_section("darknet17")))
