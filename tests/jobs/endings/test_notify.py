"""A command of the user's is told of endings, and can do the run no harm."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipcluster.runs.folder import Run
from jobs.endings import notify
from jobs.endings.verdict import Facts, Verdict

ROOT = Path(__file__).resolve().parents[3]
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
    thread.join()
    assert time.monotonic() - began < 3
    child = Path("/proc") / (run.path / "pid").read_text().strip()
    while child.exists() and (child / "stat").read_text().split()[2] != "Z":
        assert time.monotonic() - began < 10, "what the command started lives on"
        time.sleep(0.05)
    assert "on_event (finish) was ended after 0.5 s" in capfd.readouterr().err


@pytest.mark.parametrize("command", [None, "", 7, ["a"], "\0"])
def test_what_is_no_command_is_said_and_no_more(tmp_path, command, capfd):
    run = with_command(tmp_path, command)
    thread = notify.start(run, attempt_of(run), Facts(code=1), Verdict("requeue", "crashed", 85))
    if thread:
        thread.join()
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
        (Verdict("note", "requeued already", 85), "requeue"),
    ],
)
def test_what_is_told_of(verdict, event):
    assert notify.event_of(verdict) == event


def test_a_message_says_what_and_why(tmp_path):
    run = with_command(tmp_path, TELL)
    seen = Facts(code=90, said={"outcome": "failed", "step": 1234}, checkpoint=1000)
    verdict = Verdict("fail", "failed", 90, "shard 3\nchanged $(touch harm)")
    notify.start(run, attempt_of(run), seen, verdict).join()
    told = (run.path / "told").read_text()
    assert told == "fail 1234 toy-00000000 failed at step 1,234: shard 3 changed $(touch harm)\n"
    assert not (run.path / "harm").exists()


def test_any_reason_can_be_told_and_what_is_printed_is_private(tmp_path):
    """The end of a log may hold any byte, and more of them than a variable may have."""
    run = with_command(tmp_path, 'echo "$CLIPCLUSTER_ATTEMPT $CLIPCLUSTER_REASON"')
    before = os.umask(0)
    try:
        verdict = Verdict("fail", "never started", 1, "no rank started:\0\n" + "x" * 200_000)
        attempt = attempt_of(run)
        notify.start(run, attempt, Facts(code=1), verdict).join()
    finally:
        os.umask(before)
    printed = attempt.path / notify.LOG
    assert printed.read_text().startswith("1 no rank started: xxx")
    assert stat.S_IMODE(printed.stat().st_mode) == 0o600


def test_the_script_has_its_code_at_once(tmp_path, no_slurm):
    """The command hangs, and the verdict's process is killed meanwhile: the code was said before."""
    run = with_command(tmp_path, "echo $$ > pid; exec /bin/sleep 60")
    attempt_of(run).write_outcome(outcome_name="failed", code=90, rank=0, reason="shard 3 changed")
    words = [sys.executable, "-m", "jobs.endings", "verdict", str(run.path), "90"]
    environment = {**os.environ, "SLURM_JOB_ID": "17", "CLIPCLUSTER_ATTEMPT": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "90\n"
        assert process.poll() is None, "it waits for the command"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        deadline = time.monotonic() + 10
        while not (pid := run.path / "pid").exists() or not pid.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(int(pid.read_text()), signal.SIGKILL)
