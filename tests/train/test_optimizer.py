"""Groups, skipped steps, a state by name; warm-up, then half a cosine to zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from clipcluster.train.optimizer import Optimizer, StageRate, decaying
from clipcluster.train.step import clip_values


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))
        self.position = nn.Parameter(torch.zeros(1, 4, 8))
        self.linear = nn.Linear(8, 8)
        self.shared = self.linear
        self.norm = nn.LayerNorm((4, 8))
        self.conv = nn.Conv2d(1, 2, 3)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x + self.position)).sum() * self.logit_scale.squeeze()


def optimizer_of(model: nn.Module, **changes: Any) -> Optimizer:
    return Optimizer(model, **({"lr": 0.1, "weight_decay": 0.5, "betas": (0.9, 0.99), "eps": 1e-8} | changes))


def lr_of(optimizer: Optimizer, name: str) -> float:
    """The learning rate of a parameter's last update."""
    parameter = optimizer._model.get_parameter(name)
    groups = optimizer._optimizer.param_groups
    return next(group["lr"] for group in groups if any(parameter is member for member in group["params"]))


def number(value: float) -> torch.Tensor:
    return torch.tensor(value)


def test_what_decays_and_what_does_not() -> None:
    model = Tower()
    # norm.weight has two dimensions, but is a norm's.
    decays = {"position", "linear.weight", "conv.weight", "unused.weight", "frozen.weight"}
    assert decaying(model) == decays
    assert decaying(model, ["posi*", "*.nothing", "conv.weigh?"]) == decays - {"position", "conv.weight"}


def test_it_is_adamw() -> None:
    torch.manual_seed(0)
    ours, reference = nn.Linear(4, 3), nn.Linear(4, 3)
    reference.load_state_dict(ours.state_dict())
    optimizer = optimizer_of(ours)
    groups = [
        {"params": [reference.weight], "weight_decay": 0.5},
        {"params": [reference.bias], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.99), eps=1e-8, foreach=False, fused=False)
    for step in range(5):
        for model in (ours, reference):
            model.zero_grad()
            model(torch.full((2, 4), float(step + 1))).pow(2).sum().backward()
        optimizer.step(0.1, 0, divisor=number(1.0), found_inf=number(0.0))
        theirs.step()
    for one, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_parameter_without_gradient_does_not_move() -> None:
    model = Tower()
    before = model.unused.weight.clone()
    optimizer = optimizer_of(model)
    model(torch.randn(4, 8)).backward()
    assert len(optimizer.gradients()) == 6
    optimizer.step(0.1, 0, divisor=number(1.0), found_inf=number(0.0))
    assert torch.equal(model.unused.weight, before)
    state = optimizer.state_dict()
    assert state["unused.weight.step"] == 0
    assert not any(key.startswith("frozen") for key in state)


def test_found_inf_skips_the_step_and_its_count() -> None:
    model = nn.Linear(4, 3)
    optimizer = optimizer_of(model)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step(0.1, 0, divisor=number(1.0), found_inf=number(0.0))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value.clone() for name, value in optimizer.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad.fill_(float("nan"))
    optimizer.step(0.1, 0, divisor=number(1.0), found_inf=number(1.0))
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(state[name], value) for name, value in optimizer.state_dict().items())


def test_gradients_are_divided() -> None:
    torch.manual_seed(0)
    plain, scaled = nn.Linear(4, 3), nn.Linear(4, 3)
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4)
    plain(x).pow(2).sum().backward()
    (scaled(x).pow(2).sum() * 1024).backward()
    optimizer_of(plain).step(0.1, 0, divisor=number(1.0), found_inf=number(0.0))
    optimizer_of(scaled).step(0.1, 0, divisor=number(1024.0), found_inf=number(0.0))
    assert torch.equal(plain.weight, scaled.weight)


def test_a_state_goes_round_by_name() -> None:
    model = Tower()
    optimizer = optimizer_of(model)
    model(torch.randn(4, 8)).backward()
    optimizer.step(0.1, 0, divisor=number(1.0), found_inf=number(0.0))
    state = optimizer.state_dict()
    other = optimizer_of(Tower())
    other.load_state_dict(state)
    assert {k: v.tolist() for k, v in other.state_dict().items()} == {k: v.tolist() for k, v in state.items()}
    # What was loaded is a copy.
    other.state_dict()["linear.weight.exp_avg"].fill_(7)
    assert not (optimizer.state_dict()["linear.weight.exp_avg"] == 7).any()


def test_a_state_is_taken_whole_or_refused_by_name() -> None:
    """A parameter without its moments would begin with fresh ones, and nobody would know."""
    state = optimizer_of(nn.Linear(2, 2)).state_dict()
    optimizer = optimizer_of(nn.Linear(2, 2))
    for key in state:
        with pytest.raises(RuntimeError, match=rf"no entries for: {key}$"):
            optimizer.load_state_dict({name: value for name, value in state.items() if name != key})
    with pytest.raises(RuntimeError, match=r"what does not train in this model: elsewhere\.weight"):
        optimizer.load_state_dict(state | {"elsewhere.weight.exp_avg": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match=r"another shape: weight\.exp_avg$"):
        optimizer.load_state_dict(state | {"weight.exp_avg": torch.zeros(1, 2)})
    optimizer.load_state_dict(state)


def test_a_state_from_when_the_scale_had_no_dimension() -> None:
    optimizer = optimizer_of(Tower())
    state = optimizer.state_dict()
    optimizer.load_state_dict(state | {"logit_scale.exp_avg": torch.tensor(3.0)})
    assert optimizer.state_dict()["logit_scale.exp_avg"].tolist() == [3.0]


def test_regrouping_keeps_the_state_of_what_goes_on_training() -> None:
    model = Tower()
    optimizer = optimizer_of(model)
    model(torch.randn(4, 8)).backward()
    optimizer.step(0.1, 0, divisor=number(1.0), found_inf=number(0.0))
    before = {name: value.clone() for name, value in optimizer.state_dict().items()}
    model.linear.requires_grad_(False)
    model.frozen.requires_grad_(True)
    optimizer.regroup(lambda name: StageRate(0.5) if name == "position" else StageRate())
    state = optimizer.state_dict()
    assert torch.equal(state["position.exp_avg"], before["position.exp_avg"])
    assert "linear.weight.exp_avg" not in state
    assert state["frozen.weight.step"] == 0
    lrs = {"position": 0.05, "norm.weight": 0.1, "frozen.weight": 0.1}
    optimizer.clear()
    model(torch.randn(4, 8)).backward()
    optimizer.step(0.1, 0, divisor=number(1.0), found_inf=number(0.0))
    assert {name: lr_of(optimizer, name) for name in lrs} == lrs


def test_what_has_just_begun_to_train_warms_up_by_itself() -> None:
    model = Tower()
    optimizer = optimizer_of(model)
    optimizer.regroup(lambda name: StageRate(0.5, start=7, warmup=4) if name == "position" else StageRate())
    found = []
    for step in range(7, 13):
        optimizer.step(0.1, step, divisor=number(1.0), found_inf=number(0.0))
        found.append(lr_of(optimizer, "position"))
        assert lr_of(optimizer, "norm.weight") == 0.1
    assert found == pytest.approx([0.0125, 0.025, 0.0375, 0.05, 0.05, 0.05])


def test_what_requires_a_gradient_has_a_rate() -> None:
    """Else it would neither train nor be frozen."""
    with pytest.raises(ValueError, match=r"linear\.weight requires a gradient and has no learning rate"):
        optimizer_of(Tower()).regroup(lambda name: None if name == "linear.weight" else StageRate())


def test_clipping_by_value_is_torch_s_after_the_division() -> None:
    torch.manual_seed(0)
    scaled = [torch.randn(5, 3) * 1024, torch.randn(4) * 1024]
    expected = [nn.Parameter(torch.zeros_like(gradient)) for gradient in scaled]
    for parameter, gradient in zip(expected, scaled, strict=True):
        parameter.grad = gradient / 1024
    nn.utils.clip_grad_value_(expected, 0.3)
    clip_values(scaled, number(1024.0), 0.3)
    assert all(torch.equal(a, b.grad) for a, b in zip(scaled, expected, strict=True))
    assert max(gradient.abs().max().item() for gradient in scaled) == number(0.3).item()
