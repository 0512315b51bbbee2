"""The attempts of a run as its page shows them."""

import pytest

from jobs.accounting import KINDS
from jobs.endings.verdict import Facts, Job, decide
from jobs.report.facts import facts_of
from jobs.report.timeline import PREEMPTED, SHORT
from jobs.state import Queue
from tests.jobs.report.example_runs import claimed, made, preempted, told


def test_a_preemption_is_called_what_the_verdict_calls_it():
    assert decide(Facts(code=85, job=Job(running=True, preempted=True))).ending == PREEMPTED


def test_every_kind_of_time_has_a_name_and_a_colour():
    assert list(SHORT) == list(KINDS)


def test_the_time_of_every_attempt_is_accounted_for(tmp_path):
    facts = facts_of(preempted(tmp_path), Queue())
    first, second, third = facts.attempts
    assert [one.ending for one in facts.attempts] == [PREEMPTED, "crashed", "finished"]
    assert [(one.first_step, one.last_step, one.lost_steps) for one in facts.attempts] == [
        (0, 101, 0),
        (101, 140, 20),
        (120, 400, 0),
    ]
    assert {kind: seconds for kind, seconds in first.spent.items() if seconds} == pytest.approx(
        {"queue": 90, "start": 20, "rehearsal": 2, "train": 100, "data": 1.1, "save": 2.5, "end": 4.4}
    )
    assert second.spent["requeue"] == pytest.approx(70), "from the verdict before to the claim"
    assert second.spent["end"] == 0, "nobody asked a crash to stop"
    assert second.spent["lost"] == pytest.approx(20 + 260 - 256)
    assert third.spent["evaluate"] == 12
    for one in facts.attempts:
        assert one.seconds == pytest.approx(one.ended - one.began)
    assert (first.ranks, first.devices) == (2, ("cuda:0 (NVIDIA H200)", "cuda:1 (NVIDIA H200)"))
    assert first.saves == (1.5, 2.5)
    assert [event["event"] for event in second.happened] == ["roll_back"]
    train = 2 * first.spent["train"] + second.spent["train"] + third.spent["train"]
    assert facts.goodput == pytest.approx(train / (2 * 130 + 60 + 258))


def test_an_attempt_that_still_runs_is_called_what_it_does(tmp_path):
    run = made(tmp_path / "x-00000000", {})
    told(claimed(run, 0), "rank-0", ("start", 3, {"rank": 0}), ("phase", 5, {"phase": "data"}))
    (one,) = facts_of(run, Queue()).attempts
    assert one.ending in ("running", "unknown", "ended without recording an outcome")
    assert one.spent["start"] == 5
