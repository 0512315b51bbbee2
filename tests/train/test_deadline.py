"""How much time an attempt has, as its environment says."""

from __future__ import annotations

import time

import pytest

from clipcluster.runtime.stop import Stop
from clipcluster.train.deadline import Deadline


def stopped(signal: str | None, ago: float = 0.0) -> Stop:
    """A rank that was asked to stop `ago` seconds ago, by a signal or by its own clock."""
    stop = Stop()
    stop.signal = signal
    stop.request(signal or "the clock")
    stop.time = time.time() - ago
    return stop


@pytest.mark.parametrize(
    ("signal", "ago", "left", "expected"),
    [
        ("SIGTERM", 3.0, 5000.0, 17.0),  # a preemption
        ("SIGTERM", 0.0, 8.0, 8.0),  # … which the time limit overtakes
        ("SIGUSR1", 1.0, 100.0, 100.0),  # the lead time
        ("SIGUSR1", 1.0, 5000.0, 19.0),  # a site that sends it at preemptions
        (None, 0.0, 90.0, 90.0),  # rank 0's own clock
    ],
)
def test_seconds_until_the_kill(signal: str | None, ago: float, left: float, expected: float) -> None:
    deadline = Deadline(20.0, time.time() + left, lead=60.0)
    assert deadline.seconds_left(stopped(signal, ago)) == pytest.approx(expected, abs=1.0)


def test_where_only_another_rank_was_asked_the_grace_time_counts() -> None:
    assert Deadline(20.0, time.time() + 5000).seconds_left(Stop()) == pytest.approx(20.0, abs=1.0)


def test_without_a_time_limit_only_signals_stop() -> None:
    deadline = Deadline.of_environment(None, {})
    assert not deadline.near(1e9)
    assert deadline.seconds_left(stopped("SIGTERM")) == pytest.approx(30.0, abs=1.0)
    assert Deadline.of_environment(12.0, {}).grace == 12.0
    assert not deadline.by_clock(stopped(None))


def test_what_the_batch_script_says_counts() -> None:
    ends = time.time() + 600
    said = {"CLIPCLUSTER_GRACE": "120", "CLIPCLUSTER_ENDS": str(ends), "CLIPCLUSTER_LEAD": "60"}
    deadline = Deadline.of_environment(None, said)
    assert (deadline.grace, deadline.lead) == (120.0, 60.0)
    assert deadline.left == pytest.approx(600, abs=1.0)
    assert not deadline.near(500), "not before the last third"
    assert not Deadline(30.0, time.time() - 5).near(1e9), "a limit in the past is none"


def test_a_stop_begins_in_time_for_what_it_takes() -> None:
    deadline = Deadline(30.0, time.time() + 400)
    assert not deadline.near(395), "in the last third"
    deadline._ends -= 300
    assert deadline.near(95)
    assert not deadline.near(80)
