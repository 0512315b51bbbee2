"""Thinned curves keep what one looks for."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jobs.report.curves import Curve, extremes, finite, means

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300)


@given(values=values, points=st.integers(4, 60))
def test_extremes_are_points_of_the_curve_with_its_ends_and_limits(values, points):
    whole = Curve(np.arange(len(values)) * 10, np.array(values))
    thin = extremes(whole, points)
    assert len(thin.x) <= max(points + 2, min(len(values), points))
    assert np.array_equal(whole.y[thin.x // 10], thin.y)
    assert np.all(np.diff(thin.x) > 0)
    assert (thin.x[0], thin.x[-1]) == (whole.x[0], whole.x[-1])
    assert (thin.y.min(), thin.y.max()) == (whole.y.min(), whole.y.max())
    if len(values) <= points:
        assert np.array_equal(thin.y, whole.y)


@given(values=values, points=st.integers(1, 60))
def test_means_are_of_stretches_that_cover_everything(values, points):
    whole = Curve(np.arange(len(values)), np.array(values))
    thin = means(whole, points)
    assert len(thin.x) == min(points, len(values))
    assert np.all(np.diff(thin.x) > 0)
    edges = np.linspace(0, len(values), len(thin.x) + 1).astype(int)
    assert np.isclose(np.sum(thin.y * np.diff(edges)), whole.y.sum(), atol=1e-3)


def test_what_is_not_finite_is_no_point():
    curve = finite(np.array([1, 2, 3, 4]), np.array([1.0, np.nan, np.inf, 4.0]))
    assert (curve.x.tolist(), curve.y.tolist()) == ([1, 4], [1.0, 4.0])
