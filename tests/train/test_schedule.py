"""Warm-up, then half a cosine to zero."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.train.schedule import learning_rate, make_schedule

runs = st.integers(1, 5000).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total)))


@given(runs, st.floats(1e-6, 1.0))
def test_it_rises_through_the_warm_up_and_falls_after_it(run: tuple[int, int], peak: float) -> None:
    total, warmup = run
    rates = [learning_rate(step, peak=peak, warmup=warmup, total=total) for step in range(total)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a > b for a, b in pairwise(rates[warmup:]))


@given(runs)
def test_it_reaches_its_peak_after_the_warm_up_and_zero_past_the_last_step(run: tuple[int, int]) -> None:
    total, warmup = run
    if warmup < total:
        assert learning_rate(warmup, peak=2.0, warmup=warmup, total=total) == 2.0
        assert learning_rate(total, peak=2.0, warmup=warmup, total=total) == 0.0


@given(runs, st.integers(0, 5000))
def test_warm_up_is_a_line_and_the_rest_a_cosine(run: tuple[int, int], step: int) -> None:
    total, warmup = run
    step = step % total
    rate = learning_rate(step, peak=3.0, warmup=warmup, total=total)
    if step < warmup:
        assert rate == 3.0 * (step + 1) / warmup
    else:
        angle = math.pi * (step - warmup) / (total - warmup)
        assert rate == pytest.approx(1.5 * (1 + math.cos(angle)), abs=1e-12)


def test_constant_stays() -> None:
    schedule = make_schedule("constant", peak=0.5, warmup=4, total=10)
    assert [schedule(step) for step in range(10)] == [0.125, 0.25, 0.375] + [0.5] * 7


def test_the_first_step_learns() -> None:
    assert learning_rate(0, peak=1e-3, warmup=2000, total=10000) == 1e-3 / 2000
