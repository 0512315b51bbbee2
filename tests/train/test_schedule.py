"""Warm-up, then what the schedule says, as functions of the step; beside OpenCLIP's."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, optim

from clipcluster.train.schedule import learning_rate, weight_decay

totals = st.integers(1, 5000)
runs = totals.flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total)))
falling = st.sampled_from(["cosine", "linear", "wsd"])
# total, warm-up, cooldown
cooled = runs.flatmap(
    lambda run: st.tuples(st.just(run[0]), st.just(run[1]), st.integers(0, run[0] - run[1]))
)


@given(runs, st.floats(1e-6, 1.0), st.sampled_from(["cosine", "linear"]))
def test_it_rises_through_the_warm_up_and_falls_after_it(
    run: tuple[int, int], peak: float, name: Any
) -> None:
    total, warmup = run
    rates = [learning_rate(step, peak=peak, warmup=warmup, total=total, name=name) for step in range(total)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a > b for a, b in pairwise(rates[warmup:]))


@given(cooled, st.floats(0.0, 0.9), falling)
def test_it_reaches_its_peak_after_the_warm_up_and_its_minimum_past_the_last_step(
    run: tuple[int, int, int], minimum: float, name: Any
) -> None:
    total, warmup, cooldown = run
    rate = partial(
        learning_rate, peak=2.0, warmup=warmup, total=total, name=name, minimum=minimum, cooldown=cooldown
    )
    if warmup < total:
        assert rate(warmup) == 2.0
        assert rate(total) == pytest.approx(minimum if name != "wsd" or cooldown else 2.0, abs=1e-15)
    assert all(minimum <= rate(step) <= 2.0 for step in range(warmup, total))


@given(cooled, st.integers(0, 5000), st.floats(0.0, 2.0))
def test_every_value_is_the_formula_s(run: tuple[int, int, int], step: int, minimum: float) -> None:
    total, warmup, cooldown = run
    step %= total
    names = ("constant", "cosine", "linear", "wsd")
    found = {
        name: learning_rate(
            step,
            peak=3.0,
            warmup=warmup,
            total=total,
            name=name,  # type: ignore[arg-type]
            minimum=minimum,
            cooldown=cooldown,
        )
        for name in names
    }
    if step < warmup:
        assert found == dict.fromkeys(names, 3.0 * (step + 1) / warmup)
        return
    done = (step - warmup) / (total - warmup)
    into = step - (total - cooldown)
    expected = {
        "constant": 3.0,
        "cosine": minimum + (3.0 - minimum) / 2 * (1 + math.cos(math.pi * done)),
        "linear": (1 - done) * 3.0 + done * minimum,
        "wsd": 3.0 if into <= 0 else 3.0 + (minimum - 3.0) * into / cooldown,
    }
    assert found == pytest.approx(expected, abs=1e-12)


@given(cooled, st.floats(0.0, 1e-4))
def test_it_is_open_clip_s(run: tuple[int, int, int], minimum: float) -> None:
    theirs = pytest.importorskip("open_clip_train.scheduler")
    total, warmup, cooldown = run
    optimizer = optim.SGD([nn.Parameter()], lr=1.0)
    length = {"peak": 5e-4, "warmup": warmup, "total": total}
    pairs = [
        (theirs.cosine_lr(optimizer, 5e-4, warmup, total), partial(learning_rate, **length)),
        (theirs.const_lr(optimizer, 5e-4, warmup, total), partial(learning_rate, name="constant", **length)),
        (
            theirs.const_lr_cooldown(optimizer, 5e-4, warmup, total, cooldown, 1.0, minimum),
            partial(learning_rate, name="wsd", minimum=minimum, cooldown=cooldown, **length),
        ),
    ]
    for step in range(0, total, max(1, total // 20)):
        for their, ours in pairs:
            assert ours(step) == pytest.approx(their(step), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_a_warm_up_as_long_as_the_run_or_longer_never_falls(name: Any) -> None:
    """The plan refuses it; the function has a value all the same."""
    for warmup in (10, 25):
        rates = [
            learning_rate(step, peak=1.0, warmup=warmup, total=10, name=name, cooldown=4)
            for step in range(10)
        ]
        assert rates == [(step + 1) / warmup for step in range(10)]
        assert learning_rate(warmup, peak=1.0, warmup=warmup, total=10, name=name) >= 0


def test_the_first_step_learns() -> None:
    assert learning_rate(0, peak=1e-3, warmup=2000, total=10000) == 1e-3 / 2000


@given(totals, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_weight_decay_goes_along_half_a_cosine(total: int, start: float, end: float) -> None:
    values = [weight_decay(step, start=start, end=end, total=total) for step in range(total + 1)]
    assert values[0] == pytest.approx(start)
    assert values[-1] == pytest.approx(end)
    rising = [b - a for a, b in pairwise(values)]
    assert all(step * (end - start) >= -1e-12 for step in rising)
    middle = values[total // 2]
    angle = math.pi * (total // 2) / total
    assert middle == pytest.approx(end + (start - end) / 2 * (1 + math.cos(angle)))
