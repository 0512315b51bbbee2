"""The examples of jobs/examples/ on this machine, shortened."""

import json

import pytest

from jobs.examples.pipeline import pipeline
from jobs.examples.sweep import VALUES, best_of

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
SHORT = {
    "train.duration": "6 steps",
    "optim.warmup": "2 steps",
    "evaluate.every": None,
    "cluster.tasks_per_node": 1,
    "cluster.cpus_per_task": 1,
}


def test_the_pipeline_goes_one_after_the_other(tmp_path, monkeypatch, no_slurm):
    monkeypatch.setattr("jobs.examples.pipeline.SHORT", SHORT)
    runs = tmp_path / "runs"
    clip = pipeline(tmp_path / "digits", runs)
    try:
        assert clip.wait(400) == "FINISHED"
        assert [step.state for step in clip.then] == ["FINISHED"] * 2
        assert (runs / "exported" / "export.json").is_file()
        measured = json.loads((runs / "measured.json").read_text())
        assert measured["step"] == 6
        assert {name.partition("/")[0] for name in measured["metrics"]} == {"test"}
        assert any("t2i" in name for name in measured["metrics"])
    finally:
        clip.cancel()
    begun = [run.attempt(1).claim()["time"] for link in (clip, *clip.then) for run in link.runs]
    ended = clip.runs[0].attempt(1).outcome()["time"]
    assert min(begun[1:]) > ended


def test_the_best_of_a_sweep_is_exported(recipe, tmp_path, monkeypatch, no_slurm):
    values = {**VALUES, "sweep.optim.lr": [1e-5, 3e-3], "sweep.seed": [0], "train.log_every": "1 steps"}
    monkeypatch.setattr("jobs.examples.sweep.VALUES", {**values, **SHORT})
    exported = best_of(tmp_path / "runs")
    try:
        assert exported.wait(200) == "FINISHED"
        about = json.loads((tmp_path / "runs" / "best" / "export.json").read_text())
        assert about["name"].startswith("digits-lr=0.003+seed=0-")
    finally:
        exported.cancel()
