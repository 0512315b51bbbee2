"""Chains on a real cluster: dependencies, preemption of what comes first, cancelled and resumed as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipcluster.data.shards.open import open_folder
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics
from jobs import api
from jobs.cli.app import command_for
from jobs.conversions import Conversion
from jobs.examples.pipeline import pipeline
from tools.convert.convert import convert
from tools.sandbox.preempt import preempt

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
SHORT = {
    "train.duration": f"{STEPS} steps",
    "optim.warmup": "2 steps",
    "evaluate.every": None,
    "cluster.tasks_per_node": 1,
    "cluster.cpus_per_task": 3,
}


@pytest.fixture
def chain(bench, tmp_path, monkeypatch):
    """Submits a run that starts from another, both by the torch-free trainee."""
    convert("digits", tmp_path / "digits")
    monkeypatch.setenv("DIGITS", str(tmp_path / "digits"))
    (tmp_path / "before.yaml").write_text(f"extends: {ROOT}/recipes/digits.yaml\nname: before\n")
    (tmp_path / "main.yaml").write_text(
        f"extends: {ROOT}/recipes/digits.yaml\nname: main\n"
        "first: [{recipe: before.yaml, gives: [model.image.weights], overrides: ["
        "cluster.partition=low, cluster.tasks_per_node=1, cluster.cpus_per_task=3]}]\n"
    )

    def submit(orders, **more):
        monkeypatch.setenv("TRAINEE", json.dumps(orders))
        overrides = ["cluster.partition=low", "cluster.tasks_per_node=1", "cluster.cpus_per_task=3"]
        given = {"trainee": "trainee:train", "quick": True, "runs": tmp_path / "runs", **more}
        done = api.submit(tmp_path / "main.yaml", overrides, **given)
        bench.jobs += [job for one in (done, *done.first) for job in one.jobs.values()]
        return done

    return submit


def over(bench, *submitted, seconds=120):
    """Wait until all have ended."""

    def ended():
        states = [state for one in submitted for state in one.states(fresh=True)]
        return all(state.ended and not state.queued for state in states)

    bench.until(ended, seconds)


def test_a_preempted_run_keeps_the_next_waiting_until_it_has_finished(bench, chain):
    done = chain({"steps": 40, "seconds": 0.1})
    (first,) = done.first
    (job,) = done.jobs.values()
    bench.at_step(first.runs[0], 5)
    assert (first.state, done.state) == ("RUNNING", "PENDING")
    assert "Dependency" in str(done.states(fresh=True)[0])
    assert preempt(bench.sandbox.folder, first.path, come_back=False).requeued
    assert done.state == "PENDING", "a requeue is no end"
    bench.come_back(first.runs[0].newest().job)
    over(bench, first, done)
    assert (first.state, done.state) == ("FINISHED", "FINISHED")
    assert [len(run.attempts()) for run in (first.runs[0], done.runs[0])] == [2, 1]
    ended = first.runs[0].newest().outcome()["time"]
    assert done.runs[0].attempt(1).claim()["time"] > ended
    assert done.runs[0].newest().job == job


def test_what_comes_after_a_failure_never_starts_and_is_resumed(bench, chain):
    done = chain({"steps": 10, "raises": {"step": 3, "rank": 0, "error": "DataError"}})
    over(bench, *done.first, done)
    assert done.first[0].state == "FAILED"
    why = f"what comes first did not finish: {done.first[0].name} is FAILED"
    assert str(done.states(fresh=True)[0]) == f"CANCELLED ({why})"
    again = chain({"steps": 6, "seconds": 0.02})
    over(bench, *again.first, again)
    assert (again.first[0].state, again.state) == ("FINISHED", "FINISHED")
    assert len(again.runs[0].attempts()) == 1
    assert chain({}).jobs == {}


def test_cancelled_as_one_by_the_command(bench, chain, tmp_path, capsys):
    done = chain({"steps": 400, "seconds": 0.1})
    bench.at_step(done.first[0].runs[0], 3)
    command_for(["cancel"]).main(["cancel", "main", "--runs", str(tmp_path / "runs")], standalone_mode=False)
    assert capsys.readouterr().out.count(": cancelled ") == 2
    over(bench, *done.first, done)
    assert (done.first[0].state, done.state) == ("CANCELLED", "CANCELLED")
    again = chain({"steps": 5, "seconds": 0.02}, follow=True)
    over(bench, *again.first, again)
    assert again.state == "FINISHED"


def test_the_pipeline_is_cancelled_in_the_middle_and_resumes(bench, tmp_path, monkeypatch):
    """From images to shards, a classifier, a CLIP model that starts from it, an export and an evaluation."""
    monkeypatch.setattr("jobs.examples.pipeline.SHORT", SHORT)
    data, runs = tmp_path / "digits", tmp_path / "runs"
    clip = pipeline(data, runs)
    links = [clip, *clip.then, *(link for link in clip.first if isinstance(link, api.Submission))]
    bench.jobs += [job for link in links for job in link.jobs.values()]
    classifier = next(link for link in clip.first if isinstance(link, api.Submission))
    bench.until(classifier.runs[0].newest, 120)
    clip.cancel()
    over(bench, *links)
    assert clip.state == "CANCELLED"
    assert clip.runs[0].newest() is None
    assert classifier.state in ("CANCELLED", "FINISHED")

    again = pipeline(data, runs)
    links = [again, *again.then, *(link for link in again.first if isinstance(link, api.Submission))]
    bench.jobs += [job for link in links for job in link.jobs.values()]
    assert again.path == clip.path
    over(bench, *links, seconds=500)
    assert [link.state for link in links] == ["FINISHED"] * 4, bench.story()
    assert open_folder(data / "train").n_samples == 1437
    assert merged_metrics(Run(again.path))[-1]["step"] == STEPS
    assert (runs / "exported" / "export.json").is_file()
    measured = json.loads((runs / "measured.json").read_text())
    assert {name.partition("/")[0] for name in measured["metrics"]} == {"test"}
    assert Conversion(data).state == "FINISHED"
    before = [len(run.attempts()) for link in links for run in link.runs]
    third = pipeline(data, runs)
    assert third.jobs == {}
    assert [len(run.attempts()) for link in links for run in link.runs] == before


def test_a_chain_around_a_sweep_written_in_its_recipe(bench, tmp_path, monkeypatch):
    """Images are converted, then two members trained, then each of them exported and measured."""
    monkeypatch.setenv("DIGITS", str(tmp_path / "digits"))
    (tmp_path / "whole.yaml").write_text(
        f"extends: {ROOT}/recipes/digits.yaml\nname: whole\n"
        'first: [{convert: digits, out: "${DIGITS}", jobs: 2, cluster: [partition=low]}]\n'
        "sweep: {seed: [0, 1]}\n"
        f"then:\n  - {{export: safetensors, out: {tmp_path}/exported}}\n"
        f'  - {{evaluate: ["evaluate.zero_shot=[]"], out: {tmp_path}/measured.json}}\n'
    )
    given = {"runs": tmp_path / "runs", "quick": True}
    done = api.submit(tmp_path / "whole.yaml", {**SHORT, "cluster.partition": "low"}, **given)
    bench.jobs += [job for link in (done, *done.then) for job in link.jobs.values()]
    assert len(done.jobs) == 2
    assert len(done.then) == 4
    over(bench, done, *done.then, seconds=500)
    assert [link.state for link in (done, *done.then)] == ["FINISHED"] * 5, bench.story()
    for run in done.runs:
        assert json.loads((tmp_path / "exported" / run.name / "export.json").read_text())["step"] == STEPS
        measured = json.loads((tmp_path / "measured" / f"{run.name}.json").read_text())
        assert {name.partition("/")[0] for name in measured["metrics"]} == {"test"}
    assert api.submit(tmp_path / "whole.yaml", {**SHORT, "cluster.partition": "low"}, **given).jobs == {}
