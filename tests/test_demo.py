"""The demonstration as a user types it: digits, two local ranks, accuracy, retrieval and a report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipcluster.runs.names import all_runs

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder in which the demonstration ran, and what `submit` said."""
    folder = tmp_path_factory.mktemp("demo")

    def clipcluster(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    clipcluster("shards", "convert", "digits", "--out", "data/digits")
    said = clipcluster("submit", str(ROOT / "recipes/digits.yaml"), "--executor", "local", "--follow")
    (run,) = (found.path for found in all_runs(folder / "runs"))
    assert "open it in a browser" in clipcluster("report", str(run), "--out", "report.html")
    return folder, run, said


def test_digits_reach_the_accuracy(demo):
    folder, run, said = demo
    assert str(run) in said
    assert "waiting for the first batch" in said
    headline = said[said.index("evaluation at step 528") :]
    assert headline.index(" zero-shot ") < headline.index(" retrieval "), "the headline comes first"
    assert "retrieval, paired" not in headline, "evaluate --all has the rest"
    assert "clipcluster metrics" in said, "what to type next"
    last = max((run / "evals").glob("step-*.json"))
    measured = json.loads(last.read_text())["metrics"]
    assert measured["test/zero_shot_images"] == 360
    assert measured["test/zero_shot_top1"] >= 0.97
    assert measured["test/distinct_captions"] == 50
    assert measured["test/t2i_r1"] > measured["test/paired_t2i_r1"], "copies count as wrong in pairs alone"
    assert (folder / "report.html").read_text().count("<svg") >= 9


def test_its_report_in_a_browser(demo, opened, looked_at):
    report = demo[0] / "report.html"
    looked_at(report)
    with opened(report) as page:
        assert page.locator("header .state").inner_text() == "FINISHED"
        assert {"loss", "test/zero_shot_top1, %", "test/t2i_r1, %"} <= set(
            page.locator("figcaption").all_inner_texts()
        )
        images = page.locator("#gallery img")
        assert images.count() > 20
        assert all(images.evaluate_all("all => all.map(image => image.naturalWidth > 0)"))
        assert page.locator("#time tbody tr").count() == 1
        assert "Nothing: every sample could be decoded" in page.locator("#skipped").inner_text()
