"""Where the seconds of an attempt go."""

import time

import pytest

from clipcluster.train import stopwatch
from clipcluster.train.stopwatch import Stopwatch


def fail_after(seconds):
    time.sleep(seconds)
    time.sleep(-1)  # ValueError: sleep length must be non-negative


def test_every_second_is_of_one_kind_also_where_an_error_ends_it(monkeypatch):
    before = time.monotonic()
    watch = Stopwatch()
    began = time.monotonic()
    assert watch.due
    with watch.on("save"):
        time.sleep(0.02)
    with pytest.raises(ValueError, match="sleep"), watch.on("data"):
        fail_after(0.01)
    watch.add("data", 0.25)
    time.sleep(0.01)
    passed = time.monotonic() - began
    seconds = watch.read()
    assert passed - 0.01 <= sum(seconds.values()) <= time.monotonic() - before + 0.01, "rounded"
    assert seconds["save"] >= 0.02
    assert seconds["data"] >= 0.26
    assert not watch.due
    monkeypatch.setattr(stopwatch, "EVERY_SECONDS", 0.0)
    assert watch.due
    watch.begin()
    assert watch.read().keys() == {"train"}
