"""Which ranks are slow: pure functions of the seconds that are each rank's own."""

from __future__ import annotations

import pytest

from clipcluster.train.work import Slowness, slow_ranks


@pytest.mark.parametrize(
    ("own", "wall", "expected"),
    [
        ([1.0, 1.0, 1.9, 1.1], 3.0, [2]),
        ([1.0, 1.0, 1.2, 1.1], 3.0, []),  # less than 1.3 times the median
        ([0.01, 0.01, 0.05, 0.01], 3.0, []),  # it holds up nobody for long
        ([1.0, 9.0], 10.0, [1]),
        ([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0], 3.0, [4, 5, 6, 7]),  # one of two nodes
        ([5.0], 5.0, []),
        ([0.0, 0.0], 1e-9, []),
    ],
)
def test_slow_ranks(own: list[float], wall: float, expected: list[int]) -> None:
    assert slow_ranks(own, wall) == expected


def test_a_moment_is_not_slowness() -> None:
    slowness = Slowness()
    seen: list[list[int]] = [[3], [3], [], [3], [3], [3], [3], [], [], [3], [], [], []]
    changes = [slowness.changed(found, 12.0) for found in seen]
    assert [line for line, changed in enumerate(changes) if changed] == [5, 12]
    assert slowness.ranks == []
    assert not any(slowness.changed([1], 5.0) for _ in range(5))
    assert slowness.changed([1], 5.0), "three lines, and half a minute"
