"""How often `checkpoint.every: auto` saves: the formula against its model, and what it is given."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.runs.interruptions import Interruptions
from clipcluster.runtime.pulse import Pulse
from clipcluster.train.save_interval import (
    ASSUMED_SECONDS,
    FIRST_SECONDS,
    LEAST_SECONDS,
    SaveCost,
    SaveInterval,
    best_interval,
    seconds_between,
)

COSTS = st.floats(1e-3, 1e5)
BETWEEN = st.floats(1.0, 1e8)


def wall_time(interval: float, cost: float, between: float) -> float:
    """Expected seconds for a second of work (Daly 2006, equation 20, but for factors that do not change).

    Interruptions come at random, `between` seconds apart; each costs the work since the last save.
    """
    return between * math.expm1((interval + cost) / between) / interval


def exact_interval(cost: float, between: float) -> float:
    """Where `wall_time` is least: its derivative is zero where log(1 - x) + x = -cost / between, by halving.

    x is the interval in units of `between`.
    """
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if middle < 1 and math.log1p(-middle) + middle > -cost / between:
            low = middle
        else:
            high = middle
    return high * between


@given(COSTS, BETWEEN)
def test_no_other_interval_is_notably_better(cost: float, between: float) -> None:
    if cost / between < 500:  # beyond it the exponential overflows
        best = wall_time(exact_interval(cost, between), cost, between)
        assert wall_time(best_interval(cost, between), cost, between) <= 1.003 * best


@given(COSTS, BETWEEN)
def test_for_cheap_saves_it_is_the_first_order_formula(cost: float, between: float) -> None:
    young = math.sqrt(2 * cost * between)
    assert 0 < best_interval(cost, between) <= max(between, young)
    if cost < between / 100:
        assert best_interval(cost, between) == pytest.approx(young, rel=0.1)


@given(COSTS, BETWEEN, st.floats(1.0, 100.0))
def test_dearer_saves_are_rarer_and_more_interruptions_bring_more_saves(
    cost: float, between: float, factor: float
) -> None:
    usual = best_interval(cost, between) * (1 - 1e-9)
    assert best_interval(cost * factor, between) >= usual
    if cost < 2 * between:  # beyond it the approximation ends, a little above where it comes from
        assert best_interval(cost, between * factor) >= usual


@pytest.mark.parametrize(("hours", "minutes"), [(24, 117), (6, 57), (0.25, 9.1)])
def test_the_published_examples(hours: float, minutes: float) -> None:
    """Daly 2006, figures 3 to 5: a save takes 5 minutes."""
    assert best_interval(300, hours * 3600) / 60 == pytest.approx(minutes, rel=0.01)


def test_the_history_outweighs_the_assumption() -> None:
    assert seconds_between(0, 0) == ASSUMED_SECONDS
    assert seconds_between(ASSUMED_SECONDS, 1) == ASSUMED_SECONDS, "as assumed"
    assert seconds_between(1e9, 10000) == pytest.approx(1e5, rel=0.01)
    assert seconds_between(1e9, 0) > 1e9


def test_before_anything_was_measured_and_after() -> None:
    every = SaveInterval(Interruptions())
    assert every.seconds == FIRST_SECONDS
    every.saved(1e-6)
    assert every.seconds == LEAST_SECONDS
    for cost in (8.0, 8.0, 8.0, 8.0, 900.0):  # the last one met a slow disk
        every.saved(cost)
    assert every.seconds == pytest.approx(best_interval(8.0, ASSUMED_SECONDS) + 8.0, rel=1e-3)
    known = Interruptions(trained_seconds=3 * 3600.0, count=40, save_costs=(2.0, 2.0))
    assert LEAST_SECONDS < SaveInterval(known).seconds < every.seconds / 4


def test_what_a_save_costs_is_the_wait_and_the_slower_steps() -> None:
    pulse = Pulse()
    cost = SaveCost(pulse)
    assert cost.take() is None
    pulse.step_seconds.extend([1.0] * 9)
    cost.begin()
    for step, seconds in ((10, 1.5), (11, 1.25), (11, 1.25)):  # an evaluation follows step 11
        pulse.step_seconds.append(seconds)
        cost.beside(step)
    assert cost.take() == pytest.approx(0.75)
    assert cost.take() is None
    with cost.waiting():
        time.sleep(0.02)
    cost.begin()
    assert (cost.take() or 0.0) >= 0.02
    cost.begin()
    pulse.step_seconds.append(0.5)
    cost.beside(12)
    assert cost.take() == 0.0, "no save makes the training faster"
    pulse.step_seconds.clear()
    cost.begin()
    cost.beside(13)
    assert cost.take() == 0.0
