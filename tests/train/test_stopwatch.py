"""Where the seconds of an attempt go."""

import time

import pytest

from clipcluster.train import stopwatch
from clipcluster.train.stopwatch import Stopwatch


def fail_after(seconds):
    time.sleep(seconds)
    time.sleep(-1)  # ValueError: sleep length must be non-negative


def test_every_second_is_of_one_kind_also_where_an_error_ends_it(monkeypatch):
    monkeypatch.setattr(stopwatch, "EVERY_SECONDS", 0.1)
    began, watch = time.monotonic(), Stopwatch()
    assert watch.due
    with watch.on("save"):
        time.sleep(0.06)
    with pytest.raises(ValueError, match="sleep"), watch.on("data"):
        fail_after(0.03)
    time.sleep(0.02)
    seconds = watch.read()
    assert not watch.due
    assert sum(seconds.values()) == pytest.approx(time.monotonic() - began, abs=0.02)
    assert seconds["save"] >= 0.06 > seconds["data"] >= 0.03
    assert seconds["train"] >= 0.02
    time.sleep(0.11)
    assert watch.due
    watch.begin()
    assert sum(watch.read().values()) < 0.05
