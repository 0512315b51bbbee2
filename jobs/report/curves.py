"""Curves with so many points that nobody sees the rest: pure functions of arrays."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Curve(NamedTuple):
    """Values over steps (or samples): (n,) each, `x` ascending, `y` finite."""

    x: np.ndarray
    y: np.ndarray


def finite(x: np.ndarray, y: np.ndarray) -> Curve:
    """The points whose value is finite."""
    known = np.isfinite(y)
    return Curve(x[known], y[known])


def extremes(curve: Curve, points: int) -> Curve:
    """The least and the greatest value of each of `points` / 2 stretches, and the first and the last point.

    A curve of no more than `points` is returned as it is.
    """
    if len(curve.x) <= points:
        return curve
    chosen = {0, len(curve.x) - 1}
    for begin, end in _stretches(len(curve.x), points // 2):
        values = curve.y[begin:end]
        chosen |= {begin + int(values.argmin()), begin + int(values.argmax())}
    rows = np.array(sorted(chosen))
    return Curve(curve.x[rows], curve.y[rows])


def means(curve: Curve, points: int) -> Curve:
    """The mean of each of `points` stretches, at the mean of its steps.

    A curve of no more than `points` is returned as it is.
    """
    if len(curve.x) <= points:
        return curve
    stretches = list(_stretches(len(curve.x), points))
    return Curve(
        np.array([curve.x[begin:end].mean() for begin, end in stretches]),
        np.array([curve.y[begin:end].mean() for begin, end in stretches]),
    )


def _stretches(length: int, count: int) -> Iterator[tuple[int, int]]:
    """`count` ranges [begin, end) of about the same length, which together are [0, length)."""
    edges = np.linspace(0, length, count + 1).astype(int).tolist()
    return pairwise(edges)
