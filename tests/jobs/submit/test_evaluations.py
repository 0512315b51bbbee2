"""Evaluations as processes of their own on this machine, for real, with trainees that load no torch."""

import json

import pytest

from clipcluster.runs.evaluations import failed_of, owed_by
from clipcluster.runs.merge import merged_metrics
from jobs.cancel import cancel
from jobs.state import Queue, state_of
from jobs.submissions import submissions
from jobs.submit.submit import Wanted, submit


@pytest.fixture
def ask(recipe, tmp_path, monkeypatch, local, no_slurm):
    """Submits the demo's recipe, evaluations by jobs; ten steps, of which every fifth is saved and owed."""
    said = []

    def ask(**evaluation):
        monkeypatch.setenv("TRAINEE", json.dumps({"steps": 10, "seconds": 0.05, "evaluation": evaluation}))
        said.clear()
        wanted = Wanted(
            recipe=recipe,
            overrides=["evaluate.where=job", "cluster.tasks_per_node=2", "data.batch_size=128"],
            trainee="trainee:train",
            evaluator="trainee:evaluate",
            runs=tmp_path / "runs",
            quick=True,
            say=said.append,
        )
        submitted = submit(wanted)
        if submitted.job:
            local.jobs.append(submitted.job)
        return submitted.run

    ask.said = said
    return ask


def test_they_are_made_one_after_the_other_and_outlive_the_training(ask, local):
    run = ask(seconds=1.5)
    assert local.end(run).name == "FINISHED"
    left = owed_by(run)
    assert left, "the training does not wait for them"
    assert local.until(lambda: not owed_by(run))
    found = {line["step"]: line.get("val/t2i_r1") for line in merged_metrics(run)}
    assert {step: value for step, value in found.items() if value} == {5: 1 / 5, 10: 1 / 10}
    assert failed_of(run) == []
    for owed in left:
        assert local.until(lambda owed=owed: state_of(owed.job, Queue()).name == "FINISHED")
        assert len(submissions(owed.job)) == 1
        assert owed.job.settings()["cluster"]["tasks_per_node"] is None


@pytest.mark.long
def test_one_that_failed_lets_go_and_is_repeated_by_another_submission(ask, local):
    run = ask(fails=True)
    assert local.end(run).name == "FINISHED"
    assert [owed.step for owed in local.until(lambda: len(failed_of(run)) == 2 and failed_of(run))] == [5, 10]
    assert owed_by(run) == []
    assert {line["step"] for line in merged_metrics(run) if "val/t2i_r1" in line} == set()
    assert ask(seconds=0.1).path == run.path
    assert any("2 evaluations left to jobs of their own, of step 5, 10" in line for line in ask.said)
    assert local.until(lambda: not owed_by(run))
    assert {line["step"] for line in merged_metrics(run) if "val/t2i_r1" in line} == {5, 10}


@pytest.mark.long
def test_cancel_ends_them_too(ask, local):
    run = ask(seconds=60)
    (owed, *_) = local.until(lambda: [one for one in owed_by(run) if one.job.newest()])
    local.end(run)
    said = cancel(run, Queue())
    assert f"{owed.job.name}: cancelled local-" in said
    assert local.until(lambda: not state_of(owed.job, Queue()).queued)
    assert state_of(owed.job, Queue()).name == "CANCELLED"
    assert owed_by(run) == []
