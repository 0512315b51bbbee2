"""Towers compiled in place, on the CPU with its C++ compiler."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from clipcluster.errors import UserError
from clipcluster.train import compiling
from clipcluster.train.compiling import compile_towers, uncompiled

CPU = torch.device("cpu")


class Two(nn.Module):
    """Two towers, the first with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
        self.text = nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.ones(1))

    def loss(self, images: Tensor, texts: Tensor) -> Tensor:
        return (self.image(images) * self.text(texts) * self.scale).square().sum()


def gradients(model: Two, rows: int) -> list[Tensor | None]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(rows)
    images, texts = torch.randn(rows, 6), torch.randn(rows, 5)
    torch.manual_seed(3)  # dropout's
    model.loss(images, texts).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.long
def test_compiled_towers_keep_names_stages_and_dropout() -> None:
    torch.manual_seed(0)
    plain = Two()
    ours = copy.deepcopy(plain)
    compile_towers(ours, CPU)
    counts = torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]
    assert list(ours.state_dict()) == list(plain.state_dict())
    for trainable in (True, False, True):  # stages of the text tower
        for model in (plain, ours):
            model.text.requires_grad_(trainable)
        expected, found = gradients(plain, 8), gradients(ours, 8)
        assert [g is None for g in found] == [g is None for g in expected]
        torch.testing.assert_close(
            [g for g in found if g is not None], [g for g in expected if g is not None]
        )
    graphs = counts["unique_graphs"]
    assert graphs - before >= 3  # the image tower, and the text tower frozen and not
    with uncompiled():  # another shape, of which no graph is made
        assert all(map(torch.equal, gradients(ours, 3), gradients(plain, 3)))
    gradients(ours, 8)
    assert counts["unique_graphs"] == graphs


@pytest.mark.long
def test_where_compilation_ends_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "GRAPHS", 1)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)  # put back afterwards
    model = Two()
    compile_towers(model, CPU)
    for rows in (2, 3, 4, 5):
        gradients(model, rows)
    said = [text for text in caplog.messages if "more than 1 compiled graphs" in text]
    assert len(said) == 1
    assert "further ones run uncompiled and slower" in said[0]


def test_without_a_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    with pytest.raises(UserError, match=r"train.compile: .* cannot compile for cpu here .*g\+\+.*to false"):
        compile_towers(Two(), CPU)
