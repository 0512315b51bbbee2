"""Evaluations that a training leaves to jobs of their own: marks, results, and what a reader sees."""

import math

import pytest

from clipcluster.errors import StaleAttempt, UserError
from clipcluster.runs import evaluations, files, merge
from clipcluster.runs.checkpoints import EVALUATION, name_of
from clipcluster.runs.folder import Run


def checkpoint(run, step):
    """A complete checkpoint's folder, with nothing but its manifest and an empty state."""
    folder = run.checkpoints / name_of(step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    files.write_json(folder / "manifest.json", {"files": {"state.json": {"bytes": 2, "sha256": ""}}})


def results(owed, **metrics):
    about = {"step": owed.step, "samples": 8 * owed.step, "epoch": owed.step / 10, "time": 1.0, "ema": True}
    return {**about, "attempt": evaluations.attempt_of(owed), "job": "17", "metrics": metrics}


def test_owed_until_settled(run, claim):
    attempt = claim()
    second, first = evaluations.owe(attempt, 20), evaluations.owe(attempt, 5)
    assert evaluations.owe(attempt, 20) == second, "owed once"
    assert [owed.step for owed in evaluations.owed_by(run)] == [5, 20]
    assert evaluations.attempt_of(first) == 1
    checkpoint(run, 5)
    first.settle(results(first, **{"val/i2t_r1": 0.5}), {"sets": {}})
    assert evaluations.owed_by(run) == [second]
    assert evaluations.attempt_of(first) is None
    recorded = files.read_json(first.checkpoint / EVALUATION)
    assert recorded == {"step": 5, "metrics": {"val/i2t_r1": 0.5}}
    claim()
    with pytest.raises(StaleAttempt):
        evaluations.owe(attempt, 30)
    with pytest.raises(StaleAttempt):
        evaluations.drop_after(attempt, 5)


def test_its_job_has_a_folder_from_which_it_is_found(run, claim):
    owed = evaluations.owe(claim(), 123456789)
    assert owed.job.path.parent.parent.parent == run.path
    assert owed.job.name.startswith(f"{run.name}-eval-123456789-")
    found = evaluations.of_job(Run(owed.job.path))
    assert (found.run.path, found.name) == (run.path, owed.name)
    with pytest.raises(UserError, match="not the folder of an evaluation's job"):
        evaluations.of_job(run)


def test_what_was_given_up_is_owed_again_under_another_name(run, claim):
    attempt = claim()
    for step in (5, 10, 15):
        evaluations.owe(attempt, step)
    checkpoint(run, 5)
    checkpoint(run, 15)
    names = {owed.step: owed.name for owed in evaluations.owed_by(run)}
    for owed in evaluations.owed_by(run):
        owed.give_up()
    assert evaluations.owed_by(run) == []
    assert [owed.step for owed in evaluations.failed_of(run)] == [5, 10, 15]
    evaluations.owe(attempt, 15)  # the training came to it again
    assert [owed.step for owed in evaluations.owe_failed(run)] == [10]
    assert evaluations.failed_of(run) == []
    again = evaluations.owed_by(run)
    assert [owed.step for owed in again] == [5, 15]
    assert all(owed.name != names[owed.step] for owed in again)
    assert evaluations.owe_failed(run) == []


def test_what_cannot_be_read_now_stays_given_up(run, claim):
    owed = evaluations.owe(claim(), 5)
    checkpoint(run, 5)
    owed.give_up()
    manifest = owed.checkpoint / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    manifest.mkdir()  # reading it is an OSError, for root too
    assert evaluations.owe_failed(run) == []
    assert evaluations.failed_of(run) == [owed]
    manifest.rmdir()
    manifest.write_bytes(content)
    assert evaluations.owe_failed(run) == []
    assert [again.step for again in evaluations.owed_by(run)] == [5]


def test_a_later_checkpoint_is_evaluated_for_steps_that_have_none(run, claim):
    attempt = claim()
    for step in (5, 10, 15, 30):
        evaluations.owe(attempt, step)
    checkpoint(run, 10)
    assert evaluations.owe_instead(attempt, 20) == [], "it is not there"
    checkpoint(run, 20)
    assert evaluations.owe_instead(attempt, 20) == [5, 15]
    assert [owed.step for owed in evaluations.owed_by(run)] == [10, 20, 30]
    assert evaluations.owe_instead(attempt, 20) == []
    claim()
    evaluations.owe(run.newest(), 12)
    with pytest.raises(StaleAttempt):
        evaluations.owe_instead(attempt, 20)


def test_a_resume_owes_nothing_of_steps_that_it_repeats(run, claim):
    attempt = claim()
    for step in (5, 10, 15):
        evaluations.owe(attempt, step)
    evaluations.drop_after(attempt, 10)
    assert [owed.step for owed in evaluations.owed_by(run)] == [5, 10]
    evaluations.drop_after(attempt, 0)
    assert evaluations.owed_by(run) == []


def test_late_results_are_in_the_line_of_their_step(run, claim):
    attempt = claim()
    for step in (9, 10, 11):
        attempt.metrics({"step": step, "loss": 1.0 / step})
    for step, metrics in ((10, {"val/i2t_r1": 0.5, "val/loss": math.nan}), (12, {"val/i2t_r1": 0.75})):
        owed = evaluations.owe(attempt, step)
        owed.settle(results(owed, **metrics), {"sets": {}})
    files.write_json(run.evals / "step-00000011.json", {"step": 11, "metrics": {"val/i2t_r1": 0.9}})
    lines = {line["step"]: line for line in merge.merged_metrics(run)}
    assert list(lines) == [9, 10, 11, 12]
    assert (lines[10]["loss"], lines[10]["val/i2t_r1"]) == (0.1, 0.5)
    assert (lines[10]["val/loss"], lines[10]["non_finite"]) == (None, ["val/loss"])
    assert "val/i2t_r1" not in lines[11], "the training's own results are in its own lines"
    assert lines[12] == {
        "step": 12,
        "samples": 96,
        "epoch": 1.2,
        "attempt": 1,
        "time": 1.0,
        "val/i2t_r1": 0.75,
    }
