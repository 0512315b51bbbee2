"""Averages, loss scale, and the guard over numbers that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import nn

from clipcluster.errors import UserError
from clipcluster.train.ema import Ema, decay_at
from clipcluster.train.precision import Precision
from clipcluster.train.step import Guard, gradient_norm

CPU = torch.device("cpu")


def number(value: float) -> torch.Tensor:
    return torch.tensor(value)


def test_the_average_follows_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = Ema(model, 0.9)
    expected = {name: value.clone().double() for name, value in model.state_dict().items()}
    for step in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(8, 3))
        ema.update(number(0.0), step)
        for name, value in model.state_dict().items():
            expected[name] += 0.1 * (value.double() - expected[name])
    counted = "1.num_batches_tracked"
    state = ema.state_dict()
    assert state[counted] == model.state_dict()[counted] == 5
    del expected[counted]
    for name, value in expected.items():
        torch.testing.assert_close(state[name].double(), value, rtol=1e-5, atol=1e-6)
    assert state.keys() == model.state_dict().keys()
    trained = model[1].running_mean.clone()
    with ema.applied():
        assert torch.equal(model[1].running_mean, state["1.running_mean"])
    assert torch.equal(model[1].running_mean, trained)
    assert not torch.equal(trained, state["1.running_mean"])


def test_the_average_is_applied_and_taken_away_without_a_copy() -> None:
    model = nn.Linear(3, 3)
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(number(0.0), 0)
    trained, averaged = model.weight.detach().clone(), ema.state_dict()["weight"]
    storage = model.weight.data_ptr()
    with ema.applied():
        assert model.weight.data_ptr() == averaged.data_ptr()
    assert model.weight.data_ptr() == storage
    assert torch.equal(model.weight, trained)
    assert not torch.equal(averaged, trained)


def test_autocast_computes_with_the_weights_in_force() -> None:
    """Within one context, as an evaluation measures the average and then the weights themselves."""
    model = nn.Linear(3, 3, bias=False)
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1.0)
    x = torch.eye(3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        with ema.applied():
            averaged = model(x)
        after = model(x)
    assert torch.equal(before, model.weight.T.bfloat16())
    assert torch.equal(averaged, ema.state_dict()["weight"].T.bfloat16())
    assert torch.equal(after, before)


def test_an_average_is_taken_from_a_state_whole_or_not_at_all() -> None:
    model, other = nn.Linear(3, 3), nn.Linear(3, 3)
    weights = model.weight.detach().clone()
    ema = Ema(model, 0.5)
    ema.load_state_dict(other.state_dict())
    assert torch.equal(ema.state_dict()["weight"], other.weight)
    assert torch.equal(model.weight, weights)
    with pytest.raises(RuntimeError, match="bias"):
        ema.load_state_dict({"weight": other.weight})


def test_the_average_stays_at_a_skipped_step() -> None:
    model = nn.Linear(3, 3)
    ema = Ema(model, 0.5)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(number(1.0), 0)
    assert all(torch.equal(before[name], value) for name, value in ema.state_dict().items())


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_timms(warmup: bool) -> None:
    """ModelEmaV3 as timm's training script calls it: with the number of updates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()
    decay = 0.9 if warmup else 0.5
    theirs = ModelEmaV3(model, decay=decay, use_warmup=warmup)
    # Without a warm-up timm's first update copies the weights; ours has the same decay at every step.
    theirs.update_after_step = 0 if warmup else -1
    ours = Ema(model, decay, warmup=warmup, device=CPU)
    for step in range(60):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 3, dtype=torch.float64))
        theirs.update(model, step=step + 1)
        ours.update(number(0.0), step)
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, theirs.module.state_dict()[name], rtol=1e-6, atol=1e-7)
    assert theirs.get_decay(60) == decay_at(59, decay, warmup=warmup) == decay  # the warm-up has ended


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**7), st.floats(0.01, 0.99999))
def test_the_decay_warms_up(step: int, decay: float) -> None:
    now, after = (decay_at(at, decay, warmup=True) for at in (step, step + 1))
    assert 0 <= now <= after <= decay
    assert decay_at(step, decay, warmup=False) == decay
    assert decay_at(0, decay, warmup=True) == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), max_size=60))
def test_the_loss_scale_is_torchs_with_a_floor(overflows: list[bool]) -> None:
    ours = Precision("fp16", CPU)
    ours.GROWTH_INTERVAL = 3  # type: ignore[misc]
    scale, tracker = torch.tensor(65536.0), torch.tensor(0, dtype=torch.int32)
    for overflow in overflows:
        found = number(float(overflow))
        ours.update(found)
        torch._amp_update_scale_(scale, tracker, found, 2.0, 0.5, 3)
        scale.clamp_(1.0, 2.0**24)
        assert float(ours.scale) == float(scale)
    resumed = Precision("fp16", CPU)
    with pytest.raises(KeyError, match="scale"):
        resumed.load_state_dict({})
    resumed.load_state_dict(ours.state_dict())
    assert resumed.state_dict() == ours.state_dict()


def test_an_overflow_counts_only_at_the_smallest_scale() -> None:
    precision = Precision("fp16", CPU)
    for _ in range(16):
        assert not precision.counts()
        precision.update(number(1.0))
    assert precision.counts()
    assert Precision("fp32", CPU).counts()
    assert Precision("bf16", CPU).state_dict() == {}


def test_a_loss_that_is_not_finite_spoils_every_gradient() -> None:
    precision = Precision("fp32", CPU)
    model = nn.Linear(3, 1)
    loss = model(torch.ones(2, 3)).sum() * 0 + torch.inf
    loss.backward(precision.seed_gradient(loss.detach()))
    assert all(torch.isnan(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "fp16"])
def test_autocast_computes_in_its_format(name: str) -> None:
    precision = Precision(name, CPU)  # type: ignore[arg-type]
    with precision.autocast():
        assert nn.Linear(3, 3)(torch.ones(1, 3)).dtype is precision.dtype


def test_the_log_says_what_is_computed_in(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "clipcluster")
    Precision("tf32", CPU).prepare(nn.Linear(2, 2))
    Precision("fp16", CPU).prepare(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)))
    assert caplog.messages == [
        "precision: tf32 (fp32: cpu has no TF32)",
        "precision: fp16, 1 batch norm kept in fp32",
    ]


def test_a_format_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(torch.nn.functional, "conv2d", refuse)
    with pytest.raises(UserError, match=r"train.precision: fp16 does not work on cpu .* use fp32"):
        Precision("fp16", CPU)


def test_the_norm_is_of_all_gradients_together() -> None:
    gradients = [torch.randn(3, 4), torch.randn(5)]
    expected = torch.cat([g.flatten() for g in gradients]).norm()
    torch.testing.assert_close(gradient_norm(gradients), expected)
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        gradient_norm([])


def rows(pattern: list[tuple[bool, bool]]) -> tuple[int, int, int]:
    """The longest row by plain counting: (length, first, last); a step is (bad, counts)."""
    best, length, first = (0, 0, 0), 0, 0
    for index, (bad, counts) in enumerate(pattern):
        if not bad:
            length = 0
        elif counts:
            first = index if length == 0 else first
            length += 1
            best = max(best, (length, first, index), key=lambda row: row[0])
    return best


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_the_guard_counts_rows(pattern: list[tuple[bool, bool]]) -> None:
    guard = Guard(CPU, 3)
    for index, (bad, counts) in enumerate(pattern):
        found_inf = guard(number(math.inf if bad else 1.0), torch.tensor(counts), index)
        assert found_inf == float(bad)
    streak = guard.read()
    length, first, last = rows(pattern)
    assert streak.length == length
    assert streak.total == sum(bad and counts for bad, counts in pattern)
    if length:
        assert (streak.first_batch, streak.last_batch) == (first, last)


def test_a_row_is_seen_across_readings() -> None:
    guard = Guard(CPU, 3)
    for index in range(3):
        guard(number(math.nan), torch.tensor(True), index)
    assert guard.read().length == 3
    guard(number(math.nan), torch.tensor(True), 3)
    assert guard.read() == type(guard.read())(4, 0, 3, 4)
    guard(number(0.0), torch.tensor(True), 4)
    guard.read()
    assert guard.read().length == 0


def test_a_saved_row_goes_on() -> None:
    guard, resumed = Guard(CPU, 3), Guard(CPU, 3)
    for index, bad in enumerate((True, True, True, False, True, True)):
        guard(number(math.nan if bad else 1.0), torch.tensor(True), index)
    resumed.load_state_dict(guard.state_dict())
    for each in (guard, resumed):
        assert each.first_unread() == 0
        assert each.read().length == 3
        for index in (6, 7):
            each(number(math.nan), torch.tensor(True), index)
    found, expected = resumed.read(), guard.read()
    assert (found.length, found.first_batch, found.last_batch) == (4, 4, 7)
    assert (expected.length, expected.first_batch, expected.last_batch) == (4, 4, 7)
    resumed.load_state_dict({})
    assert resumed.first_unread() is None
