"""Where the time of attempts goes."""

import pytest

from clipcluster.runs.columns import columns_of
from clipcluster.runs.merge import events
from jobs.endings.verdict import Facts, Job, decide
from jobs.report.timeline import KINDS, PREEMPTED, summaries
from tests.jobs.report.example_runs import BEGIN, claimed, made, preempted, told, trained


def attempts_of(run, submitted=(), *, now=""):
    logs = [(attempt, columns_of(attempt)) for attempt in run.attempts()]
    return summaries(logs, events(run), submitted, now=now)


def test_a_preemption_is_called_what_the_verdict_calls_it():
    assert decide(Facts(code=85, job=Job(running=True, preempted=True))).ending == PREEMPTED


def test_the_time_of_every_attempt_is_accounted_for(tmp_path):
    first, second, third = attempts_of(preempted(tmp_path), [BEGIN - 90])
    assert [one.ending for one in (first, second, third)] == [PREEMPTED, "crashed", "finished"]
    assert [(one.first_step, one.last_step, one.repeated) for one in (first, second, third)] == [
        (0, 101, 0),
        (101, 140, 0),
        (120, 400, 20),
    ]
    # claimed at 0, the first step began at 22, stop asked at 124, verdict at 130; 11 lines waited 0.1 s each
    assert first.spent == pytest.approx(
        {"queue": 90, "start": 22, "train": 102 - 1.1, "data": 1.1, "evaluate": 0, "end": 6}
    )
    assert second.spent["queue"] == pytest.approx(70), "from the verdict before to the claim"
    assert second.spent["end"] == 0, "nobody asked a crash to stop"
    assert third.spent["evaluate"] == 12
    assert third.spent["end"] == pytest.approx(9), "from the evaluation's end to the verdict"
    for one in (first, second, third):
        assert one.spent.keys() == KINDS.keys()
        assert one.seconds == pytest.approx(one.ended - one.began)
    assert (first.ranks, first.devices) == (2, ("cuda:0 (NVIDIA H200)", "cuda:1 (NVIDIA H200)"))
    assert first.saves == (1.5, 2.5)
    assert [event["event"] for event in second.happened] == ["roll_back"]


def test_an_attempt_that_never_trained_only_started(tmp_path):
    run = made(tmp_path / "x-00000000", {})
    attempt = claimed(run, 0)
    told(attempt, "rank-0", ("start", 3, {"rank": 0}), ("phase", 5, {"phase": "data"}))
    told(attempt, "verdict", ("requeue", 40, {"ending": "crashed"}))
    (one,) = attempts_of(run)
    assert one.spent == {"queue": 0, "start": 40}


def test_time_before_a_run_is_submitted_again_is_no_queue(tmp_path):
    run = made(tmp_path / "x-00000000", {})
    first = claimed(run, 0)
    told(first, "verdict", ("fail", 10, {"ending": "failed", "reason": "disk full"}))
    trained(claimed(run, 1000), range(1, 9), 1010)
    before, after = attempts_of(run, [BEGIN - 5, BEGIN + 900], now="running")
    assert (before.spent["queue"], before.reason) == (5, "disk full")
    assert (after.spent["queue"], after.idle) == (100, 890)
    assert after.ending == "running"


def test_what_has_no_step_line_yet_trains_from_the_first_batch(tmp_path):
    run = made(tmp_path / "x-00000000", {})
    attempt = claimed(run, 0)
    told(attempt, "rank-0", ("phase", 30, {"phase": "first batch"}), ("checkpoint", 50, {"step": 4}))
    (one,) = attempts_of(run, now="running")
    assert (one.spent["start"], one.spent["train"], one.last_step) == (30, 20, 4)
