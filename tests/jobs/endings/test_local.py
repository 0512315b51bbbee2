"""Endings on this machine: a local run with real processes and real signals."""

import json
import os
import signal

import pytest

from clipcluster.runs.checkpoints import newest_complete
from clipcluster.runs.merge import events, merged_metrics
from jobs.cancel import cancel
from jobs.endings import history
from jobs.endings.local import visible_gpus
from jobs.state import Queue, state_of
from tests.consumed import merged_samples


def check_whole(run, steps, ranks):
    assert [line["step"] for line in merged_metrics(run)] == list(range(1, steps + 1))
    consumed = [(line["step"], line["slot"]) for line in merged_samples(run)]
    assert consumed == [(step, rank) for step in range(1, steps + 1) for rank in range(ranks)]


def test_finished(local, run):
    job = local.start(run, json.dumps({"steps": 6, "seconds": 0.02}))
    assert job.startswith("local-")
    assert local.verdict(run)["ending"] == "finished"
    assert str(local.end(run)) == "FINISHED"
    check_whole(run, 6, 2)


def test_a_crash_is_followed_by_the_next_attempt(local, run):
    local.start(
        run, json.dumps({"steps": 9, "seconds": 0.02, "crash": {"step": 7, "rank": 1, "attempts": [1]}})
    )
    first = local.verdict(run)
    assert (first["event"], first["ending"], first["checkpoint"]) == ("requeue", "crashed", 5)
    assert local.verdict(run, 2)["event"] == "finish"
    check_whole(run, 9, 2)


@pytest.mark.long
def test_the_peers_of_a_hanging_crash_are_ended(local, run):
    local.start(
        run,
        json.dumps(
            {
                "steps": 4,
                "seconds": 0.02,
                "crash": {"step": 2, "rank": 1, "attempts": [1]},
                "hang": {"step": 2, "rank": 0, "attempts": [1]},
            }
        ),
    )
    assert local.verdict(run)["ending"] == "crashed"
    assert local.verdict(run, 2)["event"] == "finish"


def test_an_error_of_rank_1_ends_the_run(local, run):
    local.start(run, json.dumps({"raises": {"step": 3, "rank": 1, "error": "DataError"}, "seconds": 0.02}))
    verdict = local.verdict(run)
    assert (verdict["event"], verdict["code"]) == ("fail", 90)
    assert "(rank 1 on" in verdict["reason"]
    state = local.end(run)
    assert (state.name, state.code) == ("FAILED", 90)
    assert len(run.attempts()) == 1


def test_a_crash_that_repeats_ends_the_run(local, run):
    local.start(run, json.dumps({"seconds": 0.02, "crash": {"step": 3, "rank": 0}}))
    verdict = local.verdict(run, 3)
    assert (verdict["event"], verdict["code"]) == ("fail", 1)
    assert "3 endings in a row" in verdict["reason"]
    assert local.end(run).name == "FAILED"


def test_the_same_exception_twice_in_a_row_ends_the_run(local, run):
    local.start(run, json.dumps({"seconds": 0.02, "raises": {"step": 7, "rank": 1, "error": "RuntimeError"}}))
    verdict = local.verdict(run, 2)
    assert (verdict["event"], verdict["ending"], verdict["code"]) == ("fail", "failed", 86)
    assert verdict["reason"] == "RuntimeError: on purpose (at step 7, twice in a row)"
    assert history.last_verdict(run.attempt(1))["raised"] == [
        {"step": 7, "signature": "RuntimeError: on purpose"}
    ]
    assert local.end(run).name == "FAILED"


def test_crashes_with_newer_checkpoints_between_go_on(local, run):
    local.start(
        run,
        json.dumps({"steps": 8, "save_every": 1, "seconds": 0.02, "crash": {"step": 3, "rank": 0}}).replace(
            '"step": 3', '"step": 3, "attempts": [1]'
        ),
    )
    local.verdict(run, 2)
    assert newest_complete(run.checkpoints) == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_term_from_outside_stops(local, run, number):
    local.start(run, json.dumps({"steps": 400}))
    local.at_step(run, 3)
    os.kill(local.pid(), number)
    verdict = local.verdict(run)
    assert (verdict["event"], verdict["ending"]) == ("stop", "told to stop")
    assert run.attempt(1).outcome()["outcome"] == "stopped"
    assert newest_complete(run.checkpoints) >= 3
    assert local.end(run).name == "STOPPED"


def test_submitting_again_goes_on(local, run):
    local.start(run, json.dumps({"steps": 12}))
    local.at_step(run, 3)
    os.kill(local.pid(), signal.SIGTERM)
    local.end(run)
    local.start(run, json.dumps({"steps": 12, "seconds": 0.02}))
    assert local.end(run).name == "FINISHED"
    assert len(run.attempts()) == 2
    check_whole(run, 12, 2)


def test_usr1_is_a_stop_that_comes_back(local, run):
    local.start(run, json.dumps({"steps": 12, "seconds": 0.05}))
    local.at_step(run, 3)
    os.kill(local.pid(), signal.SIGUSR1)
    assert local.verdict(run)["ending"] == "stopped"
    assert local.verdict(run, 2)["event"] == "finish"
    check_whole(run, 12, 2)


def test_the_time_limit_stops_and_comes_back(local, run):
    local.start(run, json.dumps({"steps": 60}), time="6 s")
    verdict = local.verdict(run)
    assert (verdict["event"], verdict["ending"], verdict["counts"]) == ("requeue", "stopped", True)
    assert 0 < verdict["checkpoint"] < 60
    assert local.verdict(run, 2)


def test_ranks_deaf_to_the_lead_time_are_out_of_time(local, run):
    local.start(run, json.dumps({"steps": 400, "deaf": {"attempts": [1]}}), time="6 s", grace=2)
    verdict = local.verdict(run)
    assert (verdict["event"], verdict["ending"]) == ("requeue", "out of time")
    local.at_step(run, verdict["checkpoint"] + 1, attempt=2)
    os.kill(local.pid(), signal.SIGTERM)
    assert local.end(run).name == "STOPPED"


def test_cancelled_for_good_and_submitted_again(local, run):
    local.start(run, json.dumps({"steps": 400}))
    local.at_step(run, 3)
    assert state_of(run, Queue()).name == "RUNNING"
    assert "cancelled" in cancel(run, Queue())
    assert local.verdict(run)["event"] == "cancel"
    assert local.end(run).name == "CANCELLED"
    local.start(run, json.dumps({"steps": 6, "seconds": 0.02}))
    assert local.end(run).name == "FINISHED"


def test_a_stop_while_importing(local, run):
    local.start(run, json.dumps({"imports": 1.5}))
    local.until(lambda: len(list((run.attempts_dir / "1").glob("events-rank-*.jsonl"))) == 2)
    os.kill(local.pid(), signal.SIGTERM)
    assert local.verdict(run)["event"] == "stop"
    assert run.attempt(1).outcome()["outcome"] == "stopped"


def test_a_local_run_whose_process_was_killed_is_lost(local, run):
    local.start(run, json.dumps({"steps": 5, "seconds": 0.5}))
    local.at_step(run, 1)
    os.kill(local.pid(), signal.SIGKILL)
    local.until(lambda: state_of(run, Queue()).name == "LOST")
    local.start(run, json.dumps({"steps": 5, "seconds": 0.02}))
    assert local.end(run).name == "FINISHED"
    old = [path.read_text() for path in (run.attempts_dir / "1").glob("rank-*.out")]
    local.until(
        lambda: all(
            "a later attempt owns the run" in path.read_text()
            for path in (run.attempts_dir / "1").glob("rank-*.out")
        )
    )
    assert len(old) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "outcome.json is not valid JSON"), ('{"outcome": "failed", "code": 7}', "reason")],
)
def test_an_attempt_that_cannot_be_judged_ends_the_run(local, run, content, reason):
    local.start(run, json.dumps({"steps": 5, "seconds": 0.2}))
    local.at_step(run, 1)
    (run.attempt(1).path / "outcome.json").write_text(content)
    state = local.end(run)
    assert (state.name, state.code) == ("FAILED", 86)
    assert reason in state.detail
    assert history.last_verdict(run.attempt(1))["checkpoint"] == 5


@pytest.mark.parametrize(("given", "seen"), [(None, "0,1"), ("", ""), ("3", "3"), ("3,5,7", "3,5")])
def test_hidden_gpus_stay_hidden(monkeypatch, given, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus(2) == seen


@pytest.mark.long
def test_a_stopped_rank_stalls_the_attempt_and_the_next_one_finishes(local, run):
    local.start(run, json.dumps({"steps": 60, "seconds": 0.02, "stalled_after": 1.0}))
    local.at_step(run, 12)
    pid = run.attempt(1).start(1)["pid"]
    os.kill(pid, signal.SIGSTOP)
    first = local.verdict(run)
    assert (first["event"], first["ending"], first["counts"]) == ("requeue", "stalled", True)
    assert "rank 1 on" in first["reason"]
    (stalled,) = [event for event in events(run) if event["event"] == "stalled"]
    assert (stalled["ranks"], stalled["attempt"]) == ([1], 1)
    assert f"process {pid} is stopped" in (run.attempt(1).path / "rank-0.out").read_text()
    assert local.verdict(run, 2)["event"] == "finish"
    check_whole(run, 60, 2)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
