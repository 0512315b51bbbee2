"""What somebody sees who watches a run."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from rich.console import Console

from clipcluster.runs import files
from jobs import logs
from jobs.follow import Events, View, event_text, follow, metrics_text
from jobs.state import State, last_metrics


def watched(run):
    console = Console(file=io.StringIO(), width=120)
    code = follow(run, console)
    return code, console.file.getvalue()


def test_from_start_to_results(local, run):
    run.evals.mkdir(exist_ok=True)
    metrics = {"val/zero_shot_top1": 0.975, "val/i2t_median_rank": 1.0, "val/distinct_captions": 50}
    files.write_json(run.evals / "step-00000006.json", {"step": 6, "metrics": metrics})
    local.start(
        run, json.dumps({"steps": 6, "seconds": 0.05, "crash": {"step": 5, "rank": 0, "attempts": [1]}})
    )
    code, text = watched(run)
    assert code == 0
    assert "attempt 1: requeue" in text
    assert "attempt 2: resuming from step 5" in text
    assert "step 6/20" in text or "FINISHED" in text
    assert "97.50 %" in text
    assert f"run folder: {run.path}" in text
    assert f"clipcluster metrics {run.path}" in text


def test_the_exit_code_is_the_runs(local, run):
    local.start(run, json.dumps({"raises": {"step": 2, "rank": 1, "error": "DataError"}, "seconds": 0.02}))
    code, text = watched(run)
    assert code == 90
    assert "FAILED (shard 00003.tar changed (rank 1 on" in text
    assert "shards verify" in text


def test_ctrl_c_stops_following_only(local, run):
    local.start(run, json.dumps({"steps": 400}))
    program = (
        "import sys; from rich.console import Console; from jobs.follow import follow; "
        "from clipcluster.runs.folder import Run; sys.exit(follow(Run(sys.argv[1]), Console()))"
    )
    watcher = subprocess.Popen(
        [sys.executable, "-c", program, run.path],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(logs.__file__).parents[1],
    )
    assert watcher.stdout.readline(), "it follows"
    local.at_step(run, 4)
    watcher.send_signal(signal.SIGINT)
    out, _ = watcher.communicate(timeout=10)
    assert watcher.returncode == 0
    assert "No longer following" in out
    assert f"  clipcluster cancel {run.path} " in out
    step = len((run.attempts_dir / "1" / "metrics.jsonl").read_text().splitlines())
    local.at_step(run, step + 3)
    os.kill(local.pid(), signal.SIGTERM)
    assert local.end(run).name == "STOPPED"


def test_events_are_told_once(run):
    attempt = run.claim("17", host="n1", still_running=lambda job: False)
    attempt.event("resume", writer="rank-0", step=3)
    events = Events(run)
    attempt.event("checkpoint", writer="rank-0", step=5)
    attempt.event("requeue", writer="verdict", reason="preempted")
    assert [event["event"] for event in events.fresh()] == ["resume", "requeue"]
    assert events.fresh() == []


def test_the_end_of_an_attempt_may_show_after_the_next_began(run):
    """As it does where a network file system is looked at from another machine."""
    first = run.claim("17", host="n1", still_running=lambda job: False)
    events = Events(run)
    events.fresh()
    run.claim("17", host="n1", still_running=lambda job: False)
    assert [event["event"] for event in events.fresh()] == ["claim"]
    files.append_lines(first.path / "events-verdict.jsonl", [{"event": "requeue", "attempt": 1}])
    assert [event["event"] for event in events.fresh()] == ["requeue"]
    for _ in range(3):
        run.claim("17", host="n1", still_running=lambda job: False)
    assert [event["attempt"] for event in events.fresh()] == [3, 4, 5]


def test_an_attempt_that_ended_is_not_starting(run):
    attempt = run.claim("17", host="n1", still_running=lambda job: False)
    attempt.event("phase", writer="rank-0", phase="first batch")
    assert [event["event"] for event in Events(run).fresh()] == ["phase"]
    attempt.write_outcome(outcome_name="finished", code=0, rank=0, step=3)
    assert Events(run).fresh() == []


def test_logs_are_followed_into_the_next_attempt(run):
    first = run.claim("17", host="n1", still_running=lambda job: False)
    (first.path / "rank-0.out").write_text("one\n")
    over = threading.Event()

    def write():
        time.sleep(0.2)
        with (first.path / "rank-0.out").open("a") as stream:
            stream.write("more\n")  # in the moment before the next attempt is seen
        for text in ("two", "three"):
            attempt = run.claim("17", host="n1", still_running=lambda job: False)
            (attempt.path / "rank-0.out").write_text(f"{text}\n")
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    text = "".join(logs.stream(logs.followed(run), over.is_set))
    writer.join()
    assert text == "one\nmore\n==> attempt 2\ntwo\n==> attempt 3\nthree\n"


def test_logs_of_a_run_that_waits_are_waited_for(run):
    paths = logs.followed(run)
    assert paths() == []
    attempt = run.claim("17", host="n1", still_running=lambda job: False)
    (attempt.path / "rank-0.out").write_text("")
    assert paths() == [attempt.path / "rank-0.out"]


def test_a_loss_that_is_not_finite_is_said(tmp_path):
    files.append_lines(tmp_path / "metrics.jsonl", [{"step": 3, "epoch": 0.5, "loss": float("nan")}])
    (line,) = files.read_lines(tmp_path / "metrics.jsonl")
    assert metrics_text(line) == "epoch 0.50  loss not finite"


def test_what_an_attempt_does_before_its_first_step_is_told(run):
    events = Events(run)
    attempt = run.claim("17", host="n1", still_running=lambda job: False)
    attempt.phase(0, "rendezvous")
    attempt.phase(0, "first batch")
    assert [event_text(event) for event in events.fresh()] == [
        "attempt 1: starting, as job 17 on n1",
        "attempt 1: waiting for all ranks",
        "attempt 1: waiting for the first batch",
    ]
    assert [event_text(event) for event in Events(run).fresh()] == ["attempt 1: waiting for the first batch"]
    attempt.event("requeue", writer="verdict", reason="preempted")
    assert Events(run).fresh() == []
    assert event_text({"event": "note", "attempt": 2, "reason": "a\nb", "step": 1000}) == (
        "attempt 2: note at step 1,000 (a b)"
    )
    stage = {"event": "stage", "attempt": 1, "step": 1541, "trainable": 42000, "parameters": 152000}
    assert event_text(stage) == "attempt 1: 42,000 of 152,000 parameters train from step 1,541"


def test_a_resumed_attempt_is_shown_at_its_step_at_once(run):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    attempt = run.claim("17", host="n1", still_running=lambda job: False)
    attempt.metrics({"step": 8, "loss": 1.0})
    view = View(run, console)
    with view.bar:
        view.show(State("RUNNING"), last_metrics(run), Events(run).fresh())
        assert view.bar.tasks[0].completed == 8
        again = run.claim("17", host="n1", still_running=lambda job: False)
        again.step = 5
        again.event("resume", writer="rank-0")
        view.show(State("RUNNING"), last_metrics(run), Events(run).fresh())
        assert view.bar.tasks[0].completed == 5
        again.metrics({"step": 6, "loss": 1.0})
        view.show(State("RUNNING"), last_metrics(run), [])
        assert view.bar.tasks[0].completed == 6
