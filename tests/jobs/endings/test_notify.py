"""A command of the user's is told of endings, and can do the run no harm."""

import json
import time
from pathlib import Path

import pytest

from clipcluster.runs.folder import Run
from jobs.endings import notify
from jobs.endings.verdict import Facts, Verdict

TELL = 'echo "$CLIPCLUSTER_EVENT $CLIPCLUSTER_STEP $CLIPCLUSTER_MESSAGE" >> told'


def with_command(path, command):
    settings = {"plan": {"total_steps": 9}, "on_event": command}
    return Run.create(path / "runs" / "toy-00000000", {"name": "toy"}, settings)


def attempt_of(run):
    return run.claim("17", host="n1", still_running=lambda job: False)


def test_a_requeue_and_the_end_are_told(local, tmp_path):
    run = with_command(tmp_path, f"{TELL}; echo heard; exit 3")
    orders = {"steps": 9, "seconds": 0.02, "crash": {"step": 7, "rank": 1, "attempts": [1]}}
    local.start(run, json.dumps(orders))
    assert str(local.end(run)) == "FINISHED"
    lines = (run.path / "told").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [["requeue", "5"], ["finish", "9"]]
    assert lines[1].endswith("toy-00000000 finished at step 9")
    assert (run.attempts_dir / "2" / "on_event.out").read_text() == "heard\n"
    log = (run.submitit / "local.log").read_text()
    assert "on_event (finish) ended with code 3; what it printed is in on_event.out" in log


def test_a_command_that_hangs_is_ended_with_all_it_started(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(notify, "SECONDS", 0.5)
    run = with_command(tmp_path, "(sleep 60; touch survived) & echo $! > pid; sleep 60")
    began = time.monotonic()
    thread = notify.start(run, attempt_of(run), Facts(code=0), Verdict("finish", "finished", 0))
    notify.wait(thread)
    assert time.monotonic() - began < 3
    assert not thread.is_alive()
    child = Path("/proc") / (run.path / "pid").read_text().strip()
    while child.exists() and (child / "stat").read_text().split()[2] != "Z":
        assert time.monotonic() - began < 10, "what the command started lives on"
        time.sleep(0.05)
    assert "on_event (finish) was ended after 0.5 s" in capfd.readouterr().err


@pytest.mark.parametrize("command", [None, "", 7, ["a"], "\0"])
def test_what_is_no_command_is_said_and_no_more(tmp_path, command, capfd):
    run = with_command(tmp_path, command)
    thread = notify.start(run, attempt_of(run), Facts(code=1), Verdict("requeue", "crashed", 85))
    notify.wait(thread)
    assert ("on_event could not be started" in capfd.readouterr().err) == bool(command)


def test_settings_that_cannot_be_read_are_said_and_no_more(tmp_path, capfd):
    run = with_command(tmp_path, "true")
    attempt = attempt_of(run)
    (attempt.path / "settings.yaml").write_text("a: [")
    assert notify.start(run, attempt, Facts(code=0), Verdict("finish", "finished", 0)) is None
    assert "on_event could not be started" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("verdict", "event"),
    [
        (Verdict("finish", "finished", 0), "finish"),
        (Verdict("fail", "failed", 90), "fail"),
        (Verdict("requeue", "preempted", 85), "requeue"),
        (Verdict("requeue", "stalled", 85), "stall"),
        (Verdict("cancel", "cancelled", 130), None),
        (Verdict("stop", "told to stop", 85), None),
        (Verdict("note", "requeued already", 85), None),
    ],
)
def test_what_is_told_of(verdict, event):
    assert notify.event_of(verdict) == event


def test_a_message_says_what_and_why(tmp_path):
    run = with_command(tmp_path, TELL)
    seen = Facts(code=90, said={"outcome": "failed", "step": 1234}, checkpoint=1000)
    verdict = Verdict("fail", "failed", 90, "shard 3\nchanged $(touch harm)")
    notify.wait(notify.start(run, attempt_of(run), seen, verdict))
    told = (run.path / "told").read_text()
    assert told == "fail 1234 toy-00000000 failed at step 1,234: shard 3 changed $(touch harm)\n"
    assert not (run.path / "harm").exists()
