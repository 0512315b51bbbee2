"""The demonstration as a user types it: digits, two local ranks, accuracy and retrieval at the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipcluster.runs.names import all_runs

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.long
@pytest.mark.timeout(900)
def test_digits_reach_the_accuracy(tmp_path):
    def clipcluster(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    clipcluster("shards", "convert", "digits", "--out", "data/digits")
    said = clipcluster("submit", str(ROOT / "recipes/digits.yaml"), "--executor", "local", "--follow")
    (run,) = (found.path for found in all_runs(tmp_path / "runs"))
    assert str(run) in said
    assert "waiting for the first batch" in said
    assert said.index("zero-shot (") < said.index("retrieval (") < said.index("retrieval, paired (")
    assert "clipcluster metrics" in said, "what to type next"
    assert "open it in a browser" in clipcluster("report", str(run), "--out", "report.html")
    assert (tmp_path / "report.html").read_text().count("<svg") >= 9
    last = max((run / "evals").glob("step-*.json"))
    measured = json.loads(last.read_text())["metrics"]
    assert measured["test/zero_shot_images"] == 360
    assert measured["test/zero_shot_top1"] >= 0.97
    assert measured["test/distinct_captions"] == 50
    assert measured["test/t2i_r1"] > measured["test/paired_t2i_r1"], "copies count as wrong in pairs alone"
