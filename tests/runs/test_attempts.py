"""An attempt: what it writes, and that it writes nothing once the next one exists."""

import socket
import threading
import time

import pytest

from clipcluster.errors import StaleAttempt
from clipcluster.runs import files

OUTCOME = {"outcome_name": "stopped", "code": 85, "rank": 0}
WRITES = {
    "event": lambda attempt: attempt.event("start", writer="rank-0"),
    "metrics": lambda attempt: attempt.metrics({"step": 1}),
    "bad_sample": lambda attempt: attempt.bad_sample(0, "0.tar", "k", "truncated"),
    "samples": lambda attempt: attempt.samples(0, [{"step": 1, "slot": 0, "shard": "0.tar", "key": "k"}]),
    "outcome": lambda attempt: attempt.write_outcome(**OUTCOME),
    "publish": lambda attempt: attempt.publish("127.0.0.1", 1, "t"),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_stale_attempt_writes_nothing(claim, write):
    old = claim()
    write(old)
    before = {path: path.read_bytes() for path in old.path.iterdir()}
    claim()
    assert old.is_stale()
    with pytest.raises(StaleAttempt, match="attempt 1"):
        write(old)
    assert {path: path.read_bytes() for path in old.path.iterdir()} == before


def test_the_newest_attempt_is_not_stale(claim):
    claim()
    newest = claim()
    newest.check()
    assert not newest.is_stale()


def test_every_line_says_its_attempt(claim):
    claim()
    attempt = claim("7_3")
    for write in WRITES.values():
        write(attempt)
    for path in attempt.path.glob("*.jsonl"):
        assert [line["attempt"] for line in files.read_lines(path)] == [2], path
    assert sorted(path.name for path in attempt.path.glob("*.jsonl")) == [
        "bad_samples-0.jsonl",
        "events-rank-0.jsonl",
        "metrics.jsonl",
        "samples-0.jsonl",
    ]
    assert attempt.outcome()["attempt"] == 2


def test_events_say_job_time_and_step(claim):
    attempt = claim("7_3")
    attempt.event("start", writer="rank-1")
    attempt.step = 12
    attempt.event("checkpoint", writer="rank-1", reason="asked")
    first, second = files.read_lines(attempt.path / "events-rank-1.jsonl")
    assert (first["event"], first["job"], "step" in first) == ("start", "7_3", False)
    assert (second["event"], second["step"], second["reason"]) == ("checkpoint", 12, "asked")
    assert abs(second["time"] - time.time()) < 60


def test_metrics_need_a_step(claim):
    with pytest.raises(ValueError, match="step"):
        claim().metrics({"loss": 1.0})


def test_the_first_outcome_stays(claim):
    attempt = claim()
    attempt.step = 5
    assert attempt.outcome() is None
    assert attempt.write_outcome(
        **{**OUTCOME, "outcome_name": "failed", "rank": 1}, reason="bad", advice="fix it"
    )
    assert not attempt.write_outcome(**OUTCOME, step=7)
    outcome = attempt.outcome()
    assert outcome.pop("time") > 0
    assert outcome == {
        "outcome": "failed",
        "code": 85,
        "step": 5,
        "rank": 1,
        "host": socket.gethostname(),
        "reason": "bad",
        "advice": "fix it",
        "go_on": False,
        "attempt": 1,
    }


def test_unknown_outcomes_are_refused(claim):
    with pytest.raises(ValueError, match="done"):
        claim().write_outcome(**{**OUTCOME, "outcome_name": "done"})


def test_waiting_for_the_outcome(claim):
    attempt = claim()
    assert attempt.wait_for_outcome(0.1) is None
    threading.Timer(0.2, lambda: attempt.write_outcome(**OUTCOME)).start()
    assert attempt.wait_for_outcome(10)["outcome"] == "stopped"


def test_rendezvous(claim):
    attempt = claim()
    threading.Timer(0.2, lambda: attempt.publish("10.0.0.1", 4242, "abc")).start()
    assert attempt.find(10) == ("10.0.0.1", 4242, "abc")


def test_rendezvous_ends_with_time_or_with_the_attempt(claim):
    attempt = claim()
    with pytest.raises(TimeoutError, match="rank 0 published no address"):
        attempt.find(0.1)
    threading.Timer(0.2, claim).start()
    with pytest.raises(StaleAttempt):
        attempt.find(10)
