"""Every one of timm's optimizers that can be used: its update, its state by name, skipped steps, stages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.nn import functional

from clipcluster.errors import UserError
from clipcluster.runs.files import read_json
from clipcluster.runtime.outcome import Outcome
from clipcluster.train import undo
from clipcluster.train.optimizer import Hyperparameters, Optimizer, StageRate, _measure_decay, decaying
from clipcluster.train.timm_optimizers import check_optimizer, timm_optimizer, usable_optimizers

USABLE = [name for name in usable_optimizers() if name != "adamw"]  # which is fused here
# One of each class, and of Muon's two kinds; the others differ in their defaults.
EACH = """
adabelief adadelta adafactor adafactorbv adagrad adam adamax adamc adamp adamuon adan adopt lamb laprop larc
lion madgrad mars muon nadam nadamlegacy nadamw novograd radamlegacy rmsprop rmsproptf sgd sgdp sgdw
"""
ALL = [name if name in EACH.split() else pytest.param(name, marks=pytest.mark.long) for name in USABLE]
LR, DECAY = 0.01, 0.1


class Tower(nn.Module):
    """Matrices large enough for factored moments and Muon, a convolution, a norm, a scale, an unused part."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 24)
        self.wide = nn.Linear(24, 20)
        self.narrow = nn.Linear(20, 6)
        self.conv = nn.Conv1d(6, 5, 3)
        self.norm = nn.LayerNorm(5)
        self.scale = nn.Parameter(torch.tensor([0.5]))
        self.unused = nn.Linear(6, 6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.narrow(functional.gelu(self.wide(self.words(tokens))))
        hidden = self.norm(self.conv(hidden.transpose(1, 2)).transpose(1, 2))
        return (hidden * self.scale.exp()).square().mean() + hidden[0].sum()


def tower(seed: int = 0) -> Tower:
    torch.manual_seed(seed)
    return Tower()


def optimizer_of(model: nn.Module, name: str, **args: Any) -> Optimizer:
    return Optimizer(model, lr=LR, weight_decay=DECAY, name=name, args=args)


def gradients(model: Tower, step: int) -> None:
    tokens = torch.randint(0, 9, (4, 7), generator=torch.Generator().manual_seed(step))
    model.zero_grad(set_to_none=True)
    model(tokens).backward()


def number(value: float) -> torch.Tensor:
    return torch.tensor(value)


def train(model: Tower, optimizer: Optimizer, steps: range, bad: tuple[int, ...] = ()) -> None:
    """Steps `bad` have gradients that are not finite, and are skipped."""
    for step in steps:
        gradients(model, step)
        if step in bad:
            for gradient in optimizer.gradients():
                gradient.fill_(float("nan"))
        lr = LR * min(1.0, (step + 1) / 3)
        optimizer.step(lr, step, divisor=number(1.0), found_inf=number(float(step in bad)))


def everything(model: Tower, optimizer: Optimizer) -> dict[str, Any]:
    return {**model.state_dict(), **{f"state {k}": v for k, v in optimizer.state_dict().items()}}


def snapshot(model: Tower, optimizer: Optimizer) -> dict[str, Any]:
    found = everything(model, optimizer)
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in found.items()}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return type(a) is type(b) and bool(a == b)

    common = [key for key in one if key in other]
    return [*(one.keys() ^ other.keys()), *(key for key in common if not same(one[key], other[key]))]


@pytest.fixture(autouse=True)
def same_sums() -> Iterator[None]:
    """An embedding's gradient adds up in the same order every time."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_which_can_be_used_and_why_the_others_cannot() -> None:
    refused = {str(name) for name in list_optimizers()} - set(USABLE)
    known = {"adahessian", "kron", "kronc", "kronw", "adamw"}
    assert known <= refused
    assert all(name.startswith(("bnb", "fused")) for name in refused - known)
    assert {"lamb", "lion", "adafactor", "muon", "nmuon", "adamuon", "adan", "sgd"} <= set(USABLE)
    for name, reason in {
        "lambb": "timm has no optimizer 'lambb'; did you mean lamb",
        "kron": "kron draws random numbers of its own.*; usable: .*lamb",
        "adahessian": "second derivatives",
        "bnbadam8bit": "another package \\(bitsandbytes\\)",
        "lookahead_lamb": "wraps another optimizer",
    }.items():
        with pytest.raises(UserError, match=reason):
            check_optimizer(name)
    with pytest.raises(UserError, match=r"timm cannot make lamb with .*momentumm"):
        timm_optimizer("lamb", {"momentumm": 1}, LR)
    with pytest.raises(UserError, match=r"optim\.args\.lr is decided by optim\.lr"):
        timm_optimizer("lion", {"lr": 1.0}, LR)


@pytest.mark.parametrize("name", ALL)
def test_the_update_is_timm_s(name: str) -> None:
    model, reference = tower(), tower()
    optimizer = optimizer_of(model, name)
    decays = decaying(reference)
    groups = [  # `scale` is the first parameter: LAMB adds norms up in the order of the groups
        {"params": [p for n, p in reference.named_parameters() if n not in decays], "weight_decay": 0.0},
        {"params": [p for n, p in reference.named_parameters() if n in decays], "weight_decay": DECAY},
    ]
    theirs = create_optimizer_v2(groups, opt=name, lr=LR)
    train(model, optimizer, range(8))
    for step in range(8):
        gradients(reference, step)
        for group in theirs.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 3)
        theirs.step()
    assert differing(model.state_dict(), reference.state_dict()) == []
    assert torch.equal(model.unused.weight, tower().unused.weight)


@pytest.mark.parametrize("name", ALL)
def test_a_skipped_step_changes_nothing_and_a_resume_continues_bit_for_bit(name: str) -> None:
    """Steps 0 and 5 are skipped: a state that would begin there, and one that has begun."""
    model = tower()
    optimizer = optimizer_of(model, name)
    before = snapshot(model, optimizer)
    train(model, optimizer, range(1), bad=(0,))
    assert differing(snapshot(model, optimizer), before) == []
    train(model, optimizer, range(1, 5))
    before = snapshot(model, optimizer)
    assert before["state wide.weight.began"] is True
    assert before["state unused.weight.began"] is (name == "adagrad")  # which begins all at once
    train(model, optimizer, range(5, 6), bad=(5,))
    saved = snapshot(model, optimizer)
    assert differing(saved, before) == []
    train(model, optimizer, range(6, 10))

    other = tower(1)
    resumed = optimizer_of(other, name)
    other.load_state_dict({key: saved[key] for key in other.state_dict()})
    resumed.load_state_dict({key[6:]: value for key, value in saved.items() if key.startswith("state ")})
    assert differing(everything(other, resumed), saved) == []
    train(other, resumed, range(6, 10))
    assert differing(everything(other, resumed), everything(model, optimizer)) == []

    never = tower()
    plain = optimizer_of(never, name)
    for step in (1, 2, 3, 4, 6, 7, 8, 9):
        train(never, plain, range(step, step + 1))
    assert differing(everything(never, plain), everything(model, optimizer)) == []


@pytest.mark.parametrize("name", ["lamb", "laprop", "muon", "nadam", "adopt"])
def test_what_an_optimizer_keeps_on_the_host_is_put_back_when_the_flag_has_arrived(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On a GPU counts stay on the host. Here they are, as far as `Undo` knows."""

    def is_on(device: torch.device, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.ndim > 0

    monkeypatch.setattr(undo, "_is_on", is_on)
    model, expected = tower(), tower()
    optimizer, other = optimizer_of(model, name), optimizer_of(expected, name)
    train(model, optimizer, range(6), bad=(0, 3, 5))
    for step in (1, 2, 4):
        train(expected, other, range(step, step + 1))
    counts = [
        group.get("step", optimizer._optimizer.state.get(model.wide.bias, {}).get("step"))
        for group in optimizer._optimizer.param_groups
    ]
    assert 4.0 in map(float, counts)  # of step 5 it does not know yet
    assert differing(everything(model, optimizer), everything(expected, other)) == []


@pytest.mark.parametrize("name", [n for n in USABLE if n in ("lamb", "adan", "muon", "adafactor", "laprop")])
def test_a_state_is_taken_whole_or_refused_by_name(name: str) -> None:
    model = tower()
    optimizer = optimizer_of(model, name)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    fresh = optimizer_of(tower(), name)
    for key in (key for key in state if key.startswith("wide.weight.")):
        with pytest.raises(RuntimeError, match=rf"no entries for: {key}"):
            fresh.load_state_dict({other: value for other, value in state.items() if other != key})
        wrong = "text" if not isinstance(state[key], torch.Tensor) else torch.zeros(2, 3)
        with pytest.raises(RuntimeError, match=rf"another shape: {key}$"):
            fresh.load_state_dict({**state, key: wrong})
    with pytest.raises(RuntimeError, match=r"what does not train in this model: elsewhere\.exp_avg"):
        fresh.load_state_dict({**state, "elsewhere.exp_avg": torch.zeros(2)})
    fresh.load_state_dict(state)


LATE = ("narrow", "words")


def thaw(optimizer: Optimizer, model: Tower, step: int) -> None:
    """`LATE` trains from step 4 on, at half the rate, and the convolution no more."""
    for name, parameter in model.named_parameters():
        frozen = name.startswith(LATE if step < 4 else "conv")
        parameter.requires_grad_(not frozen)
        if frozen:
            parameter.grad = None
    optimizer.regroup(lambda name: StageRate(0.5) if name.startswith(LATE) else StageRate())


@pytest.mark.parametrize("name", ["lamb", "adan", "muon", "adafactor", "sgd", "madgrad"])
def test_stages_keep_the_state_of_what_trains_and_resume_exactly(name: str) -> None:
    """LAMB and Adan count a group's steps: what begins later has its own count."""
    model = tower()
    optimizer = optimizer_of(model, name)
    thaw(optimizer, model, 0)
    train(model, optimizer, range(4))
    before = snapshot(model, optimizer)
    thaw(optimizer, model, 4)
    after = snapshot(model, optimizer)
    changed = differing(after, before)
    assert all(key.startswith(("state conv", "state narrow", "state words")) for key in changed)
    assert not any(key.startswith("state conv") for key in after)
    assert after["state narrow.weight.began"] is False
    train(model, optimizer, range(4, 6))
    saved = snapshot(model, optimizer)
    train(model, optimizer, range(6, 8))

    other = tower(1)
    resumed = optimizer_of(other, name)
    other.load_state_dict({key: saved[key] for key in other.state_dict()})
    thaw(resumed, other, 6)
    resumed.load_state_dict({key[6:]: value for key, value in saved.items() if key.startswith("state ")})
    train(other, resumed, range(6, 8))
    assert differing(everything(other, resumed), everything(model, optimizer)) == []
    if name in ("lamb", "adan"):
        assert float(saved["state wide.weight.step"]) == 6
        assert float(saved["state narrow.weight.step"]) == 2


def test_muon_leaves_embeddings_and_what_is_listed_to_adamw() -> None:
    model = tower()
    listed = {name: name.startswith(("words", "wide")) for name, _ in model.named_parameters()}
    hyperparameters = {name: Hyperparameters(fallback=fallback) for name, fallback in listed.items()}
    optimizer = Optimizer(model, lr=LR, name="muon", hyperparameters=hyperparameters)
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    by_muon = {key for key, value in state.items() if key.endswith("use_muon") and value}
    assert by_muon == {"narrow.weight.use_muon", "conv.weight.use_muon"}
    assert "words.weight.exp_avg_sq" in state
    assert "narrow.weight.momentum_buffer" in state


def test_corrected_weight_decay_is_measured_by_each_group_s_own_peak() -> None:
    """timm decays by lr^2 / peak; half the rate everywhere halves the decay, not quarters it."""
    decayed = []
    for factor in (1.0, 0.5):
        model = nn.Linear(4, 4, bias=False)
        nn.init.ones_(model.weight)
        hyperparameters = {"weight": Hyperparameters(factor, weight_decay=DECAY)}
        optimizer = Optimizer(model, lr=LR, name="lionc", hyperparameters=hyperparameters)
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step(LR, 0, divisor=number(1.0), found_inf=number(0.0))
        decayed.append(1 - model.weight[0, 0].item())
    assert decayed == pytest.approx([LR * DECAY, LR * DECAY / 2], rel=1e-3)
    older = {"corrected_weight_decay": True, "rate": StageRate()}  # a group of timm's before 1.0.31
    _measure_decay({**older, "hyperparameters": Hyperparameters(1.0)}, LR)
    with pytest.raises(UserError, match=r"wrong before timm 1\.0\.31 where parts"):
        _measure_decay({**older, "hyperparameters": Hyperparameters(0.5)}, LR)


@pytest.mark.parametrize("name", ["lamb", "muon", "laprop", "adafactorbv"])
def test_a_run_resumes_bit_for_bit_from_its_checkpoint_s_files(
    toy: ModuleType, tmp_path: Path, name: str
) -> None:
    """Numbers are in state.json, tensors (bfloat16 ones too) in optimizer.safetensors; batch 3 is skipped."""
    script = {"optimizer": name, "thaw_at": 6, "poison": [3], "save_every": 12, "lr": 0.01}
    whole, stopped = toy.new_run(tmp_path / "whole"), toy.new_run(tmp_path / "stopped")
    toy.go(whole, **script)
    for stop_at in (4, 8):
        assert toy.go(stopped, stop_at=stop_at, **script).outcome is Outcome.STOPPED
    assert toy.go(stopped, **script).outcome is Outcome.FINISHED
    found = []
    for run in (whole, stopped):
        folder = run.checkpoints / "step-00000012"
        found.append(
            {**load_file(folder / "optimizer.safetensors"), **load_file(folder / "model.safetensors")}
        )
        found[-1] |= read_json(folder / "state.json")["optimizer"]
    assert found[0]["words.weight.began"] is True
    assert differing(*found) == []
