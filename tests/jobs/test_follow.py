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
from jobs.follow import Events, follow, kind_of, latest_results, metrics_text, results_table, value_text


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
    assert "attempt 2: resume at step 5" in text
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
    local.at_step(run, 4)
    time.sleep(1)
    watcher.send_signal(signal.SIGINT)
    out, _ = watcher.communicate(timeout=10)
    assert watcher.returncode == 0
    assert "No longer following" in out
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
    assert [event["event"] for event in events.fresh()] == ["requeue"]
    assert events.fresh() == []


def test_logs_are_followed_into_the_next_attempt(run):
    first = run.claim("17", host="n1", still_running=lambda job: False)
    (first.path / "rank-0.out").write_text("one\n")
    over = threading.Event()

    def write():
        time.sleep(0.2)
        second = run.claim("17", host="n1", still_running=lambda job: False)
        (second.path / "rank-0.out").write_text("two\n")
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    text = "".join(logs.stream(lambda: logs.log_files(run), following=True, ended=over.is_set))
    writer.join()
    assert text == "one\ntwo\n"


def test_results(run):
    assert latest_results(run) is None
    document = {"step": 3, "metrics": {"a/zero_shot_top1": 0.5, "a/paired_i2t_r1": 0.1, "b/i2t_r1": 1.0}}
    assert results_table(document).row_count == 3
    assert kind_of("paired_t2i_mean_rank") == ("retrieval, paired", "t2i_mean_rank")
    assert kind_of("distinct_captions") == ("counts", "distinct_captions")
    assert value_text("i2t_mean_rank", 1.25) == "1.2"
    assert value_text("distinct_captions", 50) == "50"
    assert value_text("top1", 0.97222) == "97.22 %"


def test_a_loss_that_is_not_finite_is_said(tmp_path):
    files.append_line(tmp_path / "metrics.jsonl", {"step": 3, "epoch": 0.5, "loss": float("nan")})
    (line,) = files.read_lines(tmp_path / "metrics.jsonl")
    assert metrics_text(line) == "epoch 0.50  loss not finite"
    assert value_text("i2t_r1", None) == "not finite"
