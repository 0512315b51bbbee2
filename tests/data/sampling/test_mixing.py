from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcluster.data.sampling.mixing import LARGEST_PERIOD, integer_weights, lay_out
from clipcluster.errors import UserError

weights = st.lists(st.integers(1, 60), min_size=1, max_size=7)


@pytest.mark.parametrize(
    ("given_weights", "expected"),
    [
        ([3, 1], [3, 1]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([6.0, 2.0], [3, 1]),
        ([0.5], [1]),
        ([1e-3, 1], [1, 1000]),
        ([65_535, 1], [65_535, 1]),
    ],
)
def test_weights_become_the_smallest_integers(given_weights, expected):
    assert integer_weights(given_weights) == expected


@pytest.mark.parametrize(
    ("given_weights", "nearest"),
    [([0.333333, 0.666667], "1 : 2"), ([1e-6, 1], "1 : 65535"), ([65_536, 1], "65535 : 1")],
)
def test_weights_too_fine_are_refused_with_the_nearest_that_would_do(given_weights, nearest):
    with pytest.raises(UserError, match=nearest):
        integer_weights(given_weights)


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=5))
def test_the_nearest_named_can_be_given_and_is_near(given_weights):
    try:
        integer_weights(given_weights)
    except UserError as error:
        named = str(error).split("possible weights are ")[1].split(": give")[0]
        nearest = [int(number) for number in named.split(" : ")]
        assert integer_weights(nearest) == nearest
        assert sum(nearest) <= LARGEST_PERIOD
        total, ideal = sum(nearest), sum(map(Fraction, given_weights))
        for mine, theirs in zip(nearest, given_weights, strict=True):
            assert abs(Fraction(mine, total) - Fraction(theirs) / ideal) <= Fraction(
                len(nearest), LARGEST_PERIOD
            )


@settings(deadline=None)
@given(weights)
def test_a_period_holds_exactly_the_weights_and_counts_up(given_weights):
    pattern, ordinals = lay_out(given_weights)
    assert len(pattern) == sum(given_weights)
    for source, weight in enumerate(given_weights):
        assert ordinals[pattern == source].tolist() == list(range(weight))


@settings(deadline=None)
@given(weights)
def test_sources_are_spread_evenly_over_the_period(given_weights):
    pattern, _ = lay_out(given_weights)
    total = sum(given_weights)
    drawn = np.cumsum(pattern[:, None] == np.arange(len(given_weights)), axis=0)
    due = np.arange(1, total + 1)[:, None] * np.array(given_weights) / total
    assert np.abs(drawn - due).max() < max(1.0, len(given_weights) / 2)


def test_unlike_ratios_are_never_taken_for_equal():
    pattern, ordinals = lay_out([32_767, 32_769])
    due = [Fraction(2 * int(j) + 1, [32_767, 32_769][i]) for i, j in zip(pattern, ordinals, strict=True)]
    assert due == sorted(due)
