"""The loop in one process: it trains, stops, goes on, evaluates, and gives up for the right reasons."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipcluster.errors import StaleAttempt
from clipcluster.runs.evaluations import attempt_of, owe, owed_by
from clipcluster.runs.files import read_json, read_lines
from clipcluster.runs.interruptions import interruptions
from clipcluster.runs.merge import bad_samples, events, merged_metrics
from clipcluster.runtime.outcome import (
    CheckpointError,
    DataError,
    NonFiniteError,
    Outcome,
    OutOfMemory,
    RecipeFailure,
)
from clipcluster.runtime.pulse import BATCH
from clipcluster.runtime.stop import Stop, Wish
from clipcluster.train import save_interval
from clipcluster.train.checkpoint_writer import Dropped
from clipcluster.train.saver import SAVING
from jobs.accounting import accounted, told_by
from tests.consumed import merged_samples

VOLATILE = {"attempt", "time", "samples_per_second", "data_wait_seconds"}


def losses(run: Any) -> list[dict[str, Any]]:
    """All that a run logged, without what a clock decides."""
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in merged_metrics(run)]


def assert_same_weights(one: Path, other: Path) -> None:
    """Every tensor of two checkpoints is the same, bit for bit."""
    for name in ("model", "ema", "optimizer"):
        left, right = load_file(one / f"{name}.safetensors"), load_file(other / f"{name}.safetensors")
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{name}: {key}"


def fresh(toy: ModuleType, run: Any, name: str) -> Any:
    return toy.new_run(run.path.parent / name)


def test_a_run_leaves_metrics_checkpoints_and_an_outcome(toy: ModuleType, run: Any) -> None:
    trainer = toy.go(run, evaluate_every=5)
    assert trainer.outcome is Outcome.FINISHED
    assert [line["step"] for line in merged_metrics(run)] == list(range(1, 13))
    first = merged_metrics(run)[0]
    expected = {"step", "samples", "epoch", "loss", "lr", "logit_scale", "samples_per_second"}
    assert expected | {"data_wait_seconds", "time"} <= first.keys()
    assert first["samples"] == 16
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == [
        "step-00000004",
        "step-00000008",
        "step-00000012",
    ]
    state = read_json(run.checkpoints / "step-00000008" / "state.json")
    assert state["step"] == state["batches_drawn"] == 8
    assert (state["samples"], state["evaluated_step"], state["skipped"]) == (128, 5, [])
    assert run.newest().outcome()["outcome"] == "finished"
    assert run.newest().outcome()["code"] == 0
    assert sorted(path.name for path in run.evals.glob("details-*")) == [
        "details-00000005.json",
        "details-00000010.json",
        "details-00000012.json",
    ]
    assert sorted(path.name for path in run.evals.glob("step-*")) == [
        "step-00000005.json",
        "step-00000010.json",
        "step-00000012.json",
    ]
    kinds = [event["event"] for event in events(run)]
    assert kinds.count("checkpoint") == 3
    assert kinds[-1] == "finish"
    assert list(run.tensorboard.iterdir())
    recorded = [event for event in events(run) if event["event"] == "spent"]
    assert [event["step"] for event in recorded] == sorted(event["step"] for event in recorded)
    assert {event["step"] for event in recorded} == {1, 4, 5, 8, 10, 12}, "at saves and evaluations too"
    assert {"start", "data", "evaluate", "save", "train"} <= recorded[-1]["seconds"].keys()
    for before, after in pairwise(recorded):
        passed = after["time"] - before["time"]
        assert sum(after["seconds"].values()) - sum(before["seconds"].values()) == pytest.approx(
            passed, abs=0.05
        )
    (account,) = accounted([told_by(run.newest())])
    assert account.seconds == pytest.approx(account.ended - account.began, abs=1e-6)
    assert (account.spent["lost"], account.ending, account.last_step) == (0, "finished", 12)
    keys = [(line["step"], line["slot"], line["key"]) for line in merged_samples(run)]
    assert keys == [(t + 1, slot, f"{t}-{slot}") for t in range(12) for slot in range(16)]


def test_the_first_step_is_logged_and_what_comes_before_it_is_told(toy: ModuleType, run: Any) -> None:
    toy.go(run, log_every=5)
    assert [line["step"] for line in merged_metrics(run)] == [1, 5, 10, 12]
    phases = [event["phase"] for event in events(run) if event["event"] == "phase"]
    assert phases == ["checkpoint", "first batch"]


@pytest.mark.parametrize("stops", [[0], [4], [5], [10], [2, 3, 9]])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_stopped_run_resumes_bit_for_bit(
    toy: ModuleType, run: Any, stops: list[int], precision: str
) -> None:
    toy.go(run, precision=precision)
    other = fresh(toy, run, "stopped")
    for stop_at in stops:
        trainer = toy.go(other, precision=precision, stop_at=stop_at)
        assert trainer.outcome is Outcome.STOPPED
        assert trainer.progress.step == stop_at + 1
        outcome = other.newest().outcome()
        assert (outcome["outcome"], outcome["code"], outcome["go_on"]) == ("stopped", 85, True)
        assert outcome["step"] == stop_at + 1
    assert toy.go(other, precision=precision).outcome is Outcome.FINISHED
    assert losses(other) == losses(run)
    assert_same_weights(other.checkpoints / "step-00000012", run.checkpoints / "step-00000012")


def test_when_a_save_happens_changes_nothing_that_is_trained(
    toy: ModuleType, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.go(run)
    for name, value in (("FIRST_SECONDS", 0.0), ("LEAST_SECONDS", 0.0), ("ASSUMED_SECONDS", 1e-6)):
        monkeypatch.setattr(save_interval, name, value)
    other = fresh(toy, run, "auto")
    assert toy.go(other, auto=True, stop_at=6, pause=0.02).outcome is Outcome.STOPPED
    assert toy.go(other, auto=True, pause=0.02).outcome is Outcome.FINISHED
    assert losses(other) == losses(run)
    assert_same_weights(other.checkpoints / "step-00000012", run.checkpoints / "step-00000012")
    saves = [event for event in events(other) if event["event"] == "checkpoint"]
    assert len(saves) > 4
    in_background = [event["step"] for event in saves if "cost" in event]
    assert 7 not in in_background, "the training waits for the save of a stop"
    assert len(interruptions(other, 3).save_costs) == len(in_background) > 2


def test_a_stop_before_the_first_step_leaves_nothing_and_ends_cleanly(toy: ModuleType, run: Any) -> None:
    stop = Stop()
    stop.request("at once")
    trainer = toy.build(run, toy.claim(run), toy.alone(), stop, toy.Script())
    assert trainer.run() is Outcome.STOPPED
    assert list(run.checkpoints.iterdir()) == []
    assert run.newest().outcome()["outcome"] == "stopped"
    assert toy.go(run).outcome is Outcome.FINISHED


@pytest.mark.long
def test_it_stops_in_time_for_the_time_limit(toy: ModuleType, run: Any) -> None:
    """Without a signal: saves were measured, and the limit is near."""
    ends = time.time() + 6
    script = toy.Script(steps=100_000, save_every=20, pause=0.01, record=False, ends=ends)
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), script)
    trainer.saver.folder.seconds = 0.3
    assert trainer.run() is Outcome.STOPPED
    assert time.time() < ends
    outcome = run.newest().outcome()
    assert "notice of the time limit" in outcome["reason"]
    assert outcome["step"] == trainer.saver.durable_step
    (asked,) = [event for event in events(run) if event["event"] == "stop_requested"]
    assert asked["time_limit"] is True
    assert asked["time"] > ends - 3, "in the last third of its time"


def test_a_stop_while_a_save_is_under_way_leaves_both_checkpoints(toy: ModuleType, run: Any) -> None:
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script(stop_at=4))
    trainer.saver.folder.seconds = 0.3
    assert trainer.run() is Outcome.STOPPED
    assert trainer.progress.step == 5
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["step-00000004", "step-00000005"]
    whole = fresh(toy, run, "whole")
    toy.go(whole)
    toy.go(run)
    assert losses(run) == losses(whole)


def test_a_save_beside_the_training_is_no_sign_of_life(toy: ModuleType, run: Any) -> None:
    """Else rank 0 alone would seem to make progress where all are stuck while it saves."""
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script())
    pulse, saver = trainer.world.pulse, trainer.saver
    saver.folder.prepare()
    saver.folder.seconds = 0.2
    for step, doing, signs in ((1, BATCH, False), (2, SAVING, True)):
        trainer.progress.step = step
        saver.save(trainer.progress, trainer.parts)
        pulse.begin(doing)
        before = pulse.beats
        saver._write.join()
        assert (pulse.beats > before) is signs
    saver.finish()


def test_a_stop_in_an_evaluation_leaves_it_owed(toy: ModuleType, run: Any) -> None:
    trainer = toy.go(run, evaluate_every=6, stop_in_evaluation=True)
    assert (trainer.outcome, trainer.progress.step) == (Outcome.STOPPED, 6)
    assert list(run.evals.iterdir()) == []
    trainer = toy.go(run, evaluate_every=6)
    assert trainer.outcome is Outcome.FINISHED
    assert trainer.evaluations.suite.steps == [6, 12]


def test_an_evaluation_is_not_repeated_by_a_resume_and_keeps_the_losses(toy: ModuleType, run: Any) -> None:
    toy.go(run, evaluate_every=4, stop_at=4)  # the save at step 4 came before the evaluation, the stop after
    for checkpoint in run.checkpoints.iterdir():
        if checkpoint.name != "step-00000004":
            checkpoint.rename(run.path / checkpoint.name)
    trainer = toy.go(run, evaluate_every=4)
    assert trainer.evaluations.suite.steps == [8, 12]
    line = next(line for line in merged_metrics(run) if line["step"] == 4)
    assert line["toy/step"] == 4.0
    assert line["loss"] > 0


def test_an_owed_evaluation_keeps_the_loss_that_an_earlier_attempt_logged(toy: ModuleType, run: Any) -> None:
    toy.go(run, evaluate_every=6, stop_in_evaluation=True)
    before = next(line for line in merged_metrics(run) if line["step"] == 6)
    toy.go(run, evaluate_every=6)
    after = next(line for line in merged_metrics(run) if line["step"] == 6)
    assert after["loss"] == before["loss"]
    assert after["toy/step"] == 6.0


def test_a_result_that_is_not_finite_is_null_and_named(toy: ModuleType, run: Any) -> None:
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script(evaluate_every=6))
    suite = trainer.evaluations.suite
    measure = suite.run

    def broken(*given: Any, **named: Any) -> Any:
        measured = measure(*given, **named)
        measured.metrics["toy/size"] = math.nan
        return measured

    suite.run = broken
    assert trainer.run() is Outcome.FINISHED
    assert read_json(run.evals / "step-00000006.json")["metrics"]["toy/size"] is None
    assert read_json(run.evals / "step-00000006.json")["non_finite"] == ["metrics.toy/size"]
    line = merged_metrics(run)[5]
    assert line["toy/size"] is None
    assert line["non_finite"] == ["toy/size"]
    assert line["loss"] > 0


def test_averaged_weights_are_evaluated(toy: ModuleType, run: Any) -> None:
    trainer = toy.go(run, evaluate_every=12)
    results = read_json(run.evals / "step-00000012.json")
    averaged = load_file(run.checkpoints / "step-00000012" / "ema.safetensors")
    assert results["metrics"]["toy/size"] == pytest.approx(float(averaged["first.weight"].abs().sum()))
    assert results["ema"] is True
    trained = load_file(run.checkpoints / "step-00000012" / "model.safetensors")
    assert torch.equal(trainer.evaluations.model.first.weight, trained["first.weight"])


def test_the_best_checkpoint_stays(toy: ModuleType, run: Any) -> None:
    toy.go(run, evaluate_every=1, steps=9, save_every=100, keep_last=2, keep_best="toy/size")
    sizes = {
        step: read_json(run.evals / f"step-{step:08d}.json")["metrics"]["toy/size"] for step in range(1, 10)
    }
    best = max(sizes, key=sizes.get)
    assert {path.name for path in run.checkpoints.iterdir()} == {f"step-{step:08d}" for step in {best, 8, 9}}
    kept = read_json(run.checkpoints / f"step-{best:08d}" / "evaluation.json")
    assert kept["metrics"]["toy/size"] == sizes[best]


def test_a_finished_run_started_again_does_nothing(toy: ModuleType, run: Any) -> None:
    toy.go(run)
    before = {path: path.stat().st_mtime_ns for path in run.checkpoints.rglob("*")}
    assert toy.go(run).outcome is Outcome.FINISHED
    assert {path: path.stat().st_mtime_ns for path in run.checkpoints.rglob("*")} == before
    assert not (run.newest().path / "metrics.jsonl").exists()


def test_another_index_is_refused_by_the_name_of_the_shard(toy: ModuleType, run: Any) -> None:
    toy.go(run, stop_at=5)
    with pytest.raises(DataError, match=r"shard shard-0 of toy has changed"):
        toy.go(run, index="xyz")


def test_other_starting_weights_are_refused(toy: ModuleType, run: Any) -> None:
    toy.go(run, stop_at=5)
    with pytest.raises(RecipeFailure, match="starting weights of image"):
        toy.go(run, weights="others")


def test_a_state_that_does_not_fit_is_refused(toy: ModuleType, run: Any) -> None:
    toy.go(run, stop_at=5)
    with pytest.raises(
        CheckpointError, match="holds ema, guard, model, optimizer, scaler; this run has guard"
    ):
        toy.go(run, ema=False)


def test_a_non_finite_step_is_skipped(toy: ModuleType, run: Any) -> None:
    trainer = toy.go(run, poison=[5], save_every=1, keep_last=12)
    assert trainer.outcome is Outcome.FINISHED
    assert_same_weights(run.checkpoints / "step-00000005", run.checkpoints / "step-00000006")
    lines = merged_metrics(run)
    assert lines[-1]["skipped_steps"] == 1
    assert [line["step"] for line in lines if line["loss"] is None] == [6]  # null: infinities are not JSON
    assert "loss" in lines[5]["non_finite"]
    assert all(
        torch.isfinite(value).all()
        for value in load_file(run.checkpoints / "step-00000012" / "model.safetensors").values()
    )


def test_a_step_without_enough_memory_ends_with_advice_for_its_recipe(toy: ModuleType, run: Any) -> None:
    with pytest.raises(OutOfMemory, match=r"a training step: .*can't allocate memory") as caught:
        toy.go(run, exhausts_at=2)
    assert caught.value.advice == "Set train.micro_batch to 8; then submit again."


def test_a_row_of_non_finite_steps_goes_back_once_and_leaves_it_out(toy: ModuleType, run: Any) -> None:
    trainer = toy.go(run, poison=[5, 6, 7], save_every=3, limit=2)
    assert trainer.outcome is Outcome.FINISHED
    assert trainer.progress.skipped == [(5, 8)]
    assert trainer.progress.batches_drawn == 15
    consumed = [int(line["key"].split("-")[0]) for line in merged_samples(run) if line["slot"] == 0]
    assert consumed == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14]
    assert [event["event"] for event in events(run)].count("roll_back") == 1
    # What was saved during the row is out of the way: the same steps are saved anew.
    assert (run.checkpoints / "step-00000012").is_dir()
    # The same batches without ever having met the bad ones give the same weights.
    clean = fresh(toy, run, "clean")
    trainer = toy.build(clean, toy.claim(clean), toy.alone(), Stop(), toy.Script())
    trainer.progress.skipped = [(5, 8)]
    trainer.run()
    assert_same_weights(clean.checkpoints / "step-00000012", run.checkpoints / "step-00000012")


def until_the_roll_back(toy: ModuleType, run: Any, then: Callable[[Any], None], **wishes: Any) -> Any:
    """Train until the run has gone back to a checkpoint, and do something right after that."""
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script(**wishes))
    event = trainer.attempt.event

    def telling(kind: str, **fields: Any) -> None:
        event(kind, **fields)
        if kind == "roll_back":
            then(trainer)

    trainer.attempt.event = telling
    return trainer


class Killed(BaseException):
    """The process ends here."""


def kill(trainer: Any) -> None:
    raise Killed


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_run_stopped_right_after_it_went_back_replays_nothing(toy: ModuleType, run: Any, end: str) -> None:
    script = {"poison": [5, 6, 7], "save_every": 3, "limit": 2}
    if end == "kill":
        with pytest.raises(Killed):
            until_the_roll_back(toy, run, kill, **script).run()
    else:
        trainer = until_the_roll_back(toy, run, lambda it: it.stop.request("the test's wish"), **script)
        assert trainer.run() is Outcome.STOPPED
        assert trainer.progress.step == 3
    trainer = toy.go(run, **script)
    assert trainer.outcome is Outcome.FINISHED
    assert trainer.progress.skipped == [(5, 8)]
    assert [event["event"] for event in events(run)].count("roll_back") == 1
    consumed = [int(line["key"].split("-")[0]) for line in merged_samples(run) if line["slot"] == 0]
    assert consumed == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize(("stops", "save_every"), [([5], 3), ([3, 5, 6, 7], None)])
def test_a_row_of_non_finite_steps_is_one_row_over_stops(
    toy: ModuleType, run: Any, stops: list[int], save_every: int | None
) -> None:
    """The run goes back to before its first step, whose checkpoint no stop within it rotates away."""
    script = {"poison": [4, 5, 6, 7, 8], "limit": 2, "log_every": 9, "steps": 18, "keep_last": 2}
    toy.go(run, save_every=3, **script)
    other = fresh(toy, run, "stopped")
    for stop_at in stops:
        assert toy.go(other, save_every=save_every, stop_at=stop_at, **script).outcome is Outcome.STOPPED
    trainer = toy.go(other, save_every=save_every, **script)
    assert trainer.outcome is Outcome.FINISHED
    assert trainer.progress.skipped == [(4, 9)]
    assert_same_weights(other.checkpoints / "step-00000018", run.checkpoints / "step-00000018")


def test_a_run_stopped_right_after_it_went_back_does_not_go_back_twice(toy: ModuleType, run: Any) -> None:
    script = {"poison": [5, 6, 7, 9, 10, 11], "save_every": 3, "limit": 2}
    with pytest.raises(Killed):
        until_the_roll_back(toy, run, kill, **script).run()
    with pytest.raises(NonFiniteError, match="once already"):
        toy.go(run, **script)
    assert [event["event"] for event in events(run)].count("roll_back") == 1


def test_a_run_killed_while_it_went_back_resumes_before_the_row(toy: ModuleType, run: Any) -> None:
    script = {"poison": [4, 5, 6, 7, 8, 9], "save_every": 3, "limit": 2, "log_every": 9, "steps": 18}
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script(**script))
    trainer.saver.folder.set_aside = lambda step, reason: kill(trainer)  # the first thing after the record
    with pytest.raises(Killed):
        trainer.run()
    assert (run.checkpoints / "step-00000006").is_dir()
    trainer = toy.go(run, **script)
    assert trainer.outcome is Outcome.FINISHED
    assert trainer.progress.skipped == [(4, 9)]
    assert next(event for event in events(run) if event["event"] == "resume")["checkpoint"] == "step-00000003"
    aside = sorted(path.name for path in run.checkpoints.iterdir() if path.name.startswith("broken-"))
    assert aside == ["broken-step-00000006-1"]


@pytest.mark.parametrize(
    "content", ["", "7", "{}", '{"skipped": 3}', '{"skipped": [[5]]}', '{"skipped": ["ab"]}']
)
def test_a_damaged_record_of_a_roll_back_is_refused(toy: ModuleType, run: Any, content: str) -> None:
    attempt = toy.claim(run)
    (attempt.path / "roll_back.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"roll_back.json is damaged"):
        toy.go(run)


def test_a_roll_back_that_cannot_be_recorded_ends_the_run(toy: ModuleType, run: Any) -> None:
    trainer = toy.build(
        run, toy.claim(run), toy.alone(), Stop(), toy.Script(poison=[5, 6, 7], save_every=3, limit=2)
    )
    fetch = trainer.feed.next

    def fetch_and_obstruct() -> Any:
        (trainer.attempt.path / "roll_back.json" / "in the way").mkdir(parents=True, exist_ok=True)
        return fetch()

    trainer.feed.next = fetch_and_obstruct
    with pytest.raises(CheckpointError, match="roll-back cannot be recorded"):
        trainer.run()


def test_where_all_checkpoints_are_of_the_row_the_run_does_not_start_anew(toy: ModuleType, run: Any) -> None:
    script = {"poison": [4, 5, 6, 7, 8, 9], "save_every": 3, "limit": 2, "log_every": 9, "steps": 18}
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script(**script))
    trainer.saver.folder.set_aside = lambda step, reason: kill(trainer)
    with pytest.raises(Killed):
        trainer.run()
    (run.checkpoints / "step-00000003").rename(run.path / "lost")
    with pytest.raises(CheckpointError, match=r"step-00000006.*batches 4 to 8"):
        toy.go(run, **script)


def test_checkpoints_of_a_row_of_non_finite_steps_are_set_aside(toy: ModuleType, run: Any) -> None:
    toy.go(run, poison=[4, 5, 6, 7, 8, 9], save_every=3, limit=2, log_every=9, steps=18)
    aside = sorted(path.name for path in run.checkpoints.iterdir() if path.name.startswith("broken-"))
    assert aside == ["broken-step-00000006-1"]
    assert "saved within batches 4 to 8" in read_json(run.checkpoints / aside[0] / "why.json")["reason"]


@pytest.mark.parametrize("poison", [[4, 5, 6, 7, 8], [2, 4, 5, 6, 7], [1, 2, 3, 5, 7, 8]])
def test_the_checkpoint_before_a_row_that_no_log_step_has_told_of_stays(
    toy: ModuleType, run: Any, poison: list[int]
) -> None:
    trainer = toy.go(run, poison=poison, save_every=1, keep_last=2, limit=2, log_every=9, steps=18)
    assert trainer.outcome is Outcome.FINISHED
    assert [event["event"] for event in events(run)].count("roll_back") == 1
    assert trainer.saver.folder.steps() == [17, 18]


def test_a_second_row_of_non_finite_steps_ends_the_run(toy: ModuleType, run: Any) -> None:
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .* once already") as raised:
        toy.go(run, poison=[5, 6, 7, 9, 10, 11], save_every=3, limit=2)
    assert raised.value.agreed
    assert "optim.lr" in raised.value.advice
    with pytest.raises(NonFiniteError):
        toy.go(run, poison=[5, 6, 7, 9, 10, 11], save_every=3, limit=2)


def test_a_row_of_non_finite_steps_before_any_checkpoint_ends_the_run(toy: ModuleType, run: Any) -> None:
    with pytest.raises(NonFiniteError, match="no checkpoint is older"):
        toy.go(run, poison=[0, 1, 2], limit=2)


def test_an_overflow_of_the_loss_scale_does_not_count(toy: ModuleType, run: Any) -> None:
    trainer = toy.go(run, precision="fp16", poison=[3, 4, 5, 6, 7], limit=2)
    assert trainer.outcome is Outcome.FINISHED
    assert float(trainer.step.backward.precision.scale) == 65536 / 2**5
    assert "skipped_steps" not in merged_metrics(run)[-1]


def test_bad_samples_are_written_once_and_too_many_end_the_run(toy: ModuleType, run: Any) -> None:
    assert toy.go(run, bad=[1, 2]).outcome is Outcome.FINISHED
    assert [sample["key"] for sample in bad_samples(run)] == ["bad-1", "bad-2"]
    other = fresh(toy, run, "worse")
    with pytest.raises(DataError, match=r"3 samples cannot be decoded.*0.002 of 1,000.*shard-1 \(3\)"):
        toy.go(other, bad=[1, 2, 3])
    # The limit is on the run, not on an attempt.
    with pytest.raises(DataError, match="4 samples cannot be decoded"):
        toy.go(other, bad=[5])


def test_a_bad_sample_that_could_not_be_recorded_is_recorded_when_it_comes_again(
    toy: ModuleType, run: Any
) -> None:
    records = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script()).records
    bad = [{"shard": "s", "key": key, "reason": "truncated"} for key in "abc"]
    obstacle = records.attempt.path / "bad_samples-0.jsonl"
    obstacle.mkdir()
    records.bad_samples(bad[:2])
    obstacle.rmdir()
    for _ in range(2):
        records.bad_samples(bad)
    assert [sample["key"] for sample in read_lines(obstacle)] == ["a", "b", "c"]
    assert records.failure is None


def test_a_stale_attempt_writes_nothing_more(toy: ModuleType, run: Any) -> None:
    attempt = toy.claim(run)
    trainer = toy.build(run, attempt, toy.alone(), Stop(), toy.Script(stop_at=None, log_every=1))
    fetch = trainer.feed.next

    def fetch_and_lose() -> Any:
        if trainer.progress.step == 5:
            trainer.saver.finish()
            toy.claim(run, "2")
        return fetch()

    trainer.feed.next = fetch_and_lose
    with pytest.raises(StaleAttempt):
        trainer.run()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000004"]
    lines = read_lines(attempt.path / "metrics.jsonl")
    assert lines[-1]["step"] == 5
    assert attempt.outcome() is None


def test_curves_are_not_written_once_a_later_attempt_owns_the_run(toy: ModuleType, run: Any) -> None:
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script())
    fetch = trainer.feed.next
    sizes: dict[Path, int] = {}

    def fetch_and_lose() -> Any:
        if trainer.progress.step == 5:
            time.sleep(0.2)
            sizes.update({path: path.stat().st_size for path in run.tensorboard.iterdir()})
            toy.claim(run, "2")
        return fetch()

    trainer.feed.next = fetch_and_lose
    with pytest.raises(StaleAttempt):
        trainer.run()
    assert len(sizes) == 1
    assert {path: path.stat().st_size for path in run.tensorboard.iterdir()} == sizes


def test_curves_are_written_for_others_to_read(toy: ModuleType, run: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy.go(run, stop_at=5, evaluate_every=4)
    time.sleep(1 - time.time() % 1)  # files of one second are read by name: the tenth before the ninth
    toy.go(run, evaluate_every=4)
    curves = EventAccumulator(str(run.tensorboard)).Reload()
    losses = [(point.step, point.value) for point in curves.Scalars("train/loss")]
    assert losses == [(line["step"], pytest.approx(line["loss"])) for line in merged_metrics(run)]
    assert [point.step for point in curves.Scalars("evaluation/toy/step")] == [4, 8, 12]


def fill_the_disk_of_the_curves(trainer: Any, at_step: int) -> None:
    """From a step on nothing more can be written to TensorBoard's file."""
    fetch = trainer.feed.next

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fetch_and_fill() -> Any:
        if trainer.progress.step == at_step:
            record = trainer.metrics._board._writer.file_writer.event_writer._async_writer._writer
            record.write = record.flush = full
        return fetch()

    trainer.feed.next = fetch_and_fill


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_room_for_curves_hides_no_failure_and_loses_no_record(toy: ModuleType, run: Any) -> None:
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script())
    fill_the_disk_of_the_curves(trainer, 2)
    assert trainer.run() is Outcome.FINISHED
    assert [line["step"] for line in merged_metrics(run)] == list(range(1, 13))
    other = fresh(toy, run, "other")
    trainer = toy.build(other, toy.claim(other), toy.alone(), Stop(), toy.Script(bad=[4, 5, 6, 7]))
    fill_the_disk_of_the_curves(trainer, 2)
    with pytest.raises(DataError, match="samples cannot be decoded"):
        trainer.run()
    assert trainer.progress.step == 7  # three bad ones are too many


def test_the_newest_checkpoint_broken_is_set_aside_and_the_one_before_used(toy: ModuleType, run: Any) -> None:
    toy.go(run)
    whole = fresh(toy, run, "whole")
    toy.go(whole)
    file = run.checkpoints / "step-00000012" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    trainer = toy.go(run)
    assert trainer.outcome is Outcome.FINISHED
    resumed = [event for event in events(run) if event["event"] == "resume"]
    assert resumed[0]["checkpoint"] == "step-00000008"
    assert_same_weights(run.checkpoints / "step-00000012", whole.checkpoints / "step-00000012")


def test_a_run_never_starts_from_scratch_over_checkpoints(toy: ModuleType, run: Any) -> None:
    toy.go(run)
    for manifest in run.checkpoints.glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match=r"No checkpoint .* can be used .*manifest.json is missing"):
        toy.go(run)
    assert len(list(run.checkpoints.glob("step-*"))) == 3


def test_a_model_without_its_starting_weights_never_starts_from_scratch(toy: ModuleType, run: Any) -> None:
    """Somebody moves the checkpoints away while an attempt that saw them starts."""
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script())
    trainer.resumes = True
    with pytest.raises(CheckpointError, match="moved away while this attempt started"):
        trainer.run()


def test_a_save_that_fails_twice_ends_the_run_and_rotates_nothing(
    toy: ModuleType, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script(save_every=2, keep_last=2))
    fetch = trainer.feed.next

    def fetch_until_full() -> Any:
        if trainer.progress.step == 7:
            trainer.saver.finish()
            run.checkpoints.rename(run.path / "hidden")  # as a file system that went away
            run.checkpoints.write_text("")
        return fetch()

    trainer.feed.next = fetch_until_full
    with pytest.raises(CheckpointError, match="2 saves in a row failed"):
        trainer.run()
    kinds = [event["event"] for event in events(run)]
    assert kinds.count("checkpoint_failed") == 2
    assert sorted(path.name for path in (run.path / "hidden").iterdir()) == ["step-00000004", "step-00000006"]


def test_the_loader_is_closed_whatever_ends_the_run(toy: ModuleType, run: Any) -> None:
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script(poison=[0, 1, 2]))
    loaders: list[Any] = []
    open_batches = trainer.feed._open_batches

    def opened(progress: Any) -> Any:
        loaders.append(open_batches(progress))
        return loaders[-1]

    trainer.feed._open_batches = opened
    with pytest.raises(NonFiniteError):
        trainer.run()
    assert [loader.closed for loader in loaders] == [True]


def test_metrics_are_json_that_others_can_read(toy: ModuleType, run: Any) -> None:
    toy.go(run, steps=2)
    text = (run.newest().path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2]


def settle(toy: ModuleType, run: Any, step: int, size: float) -> None:
    """What a job of its own does that measured a step."""
    (owed,) = [owed for owed in owed_by(run) if owed.step == step]
    document = {"step": step, "attempt": attempt_of(owed), "job": "7", "metrics": {"toy/size": size}}
    owed.settle(document, {"sets": {}})


def test_an_evaluation_by_a_job_keeps_its_checkpoint_until_it_is_done(toy: ModuleType, run: Any) -> None:
    script = {"evaluate_every": 3, "by_job": True, "save_every": 1, "keep_last": 2, "steps": 10}
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script(**script))
    fetch = trainer.feed.next

    def fetch_and_settle() -> Any:
        if trainer.progress.step == 8:
            trainer.saver.finish()
            assert trainer.saver.folder.steps() == [3, 6, 7, 8]
            settle(toy, run, 3, 1.0)
        return fetch()

    trainer.feed.next = fetch_and_settle
    assert trainer.run() is Outcome.FINISHED
    assert trainer.evaluations.suite.steps == []
    assert [owed.step for owed in owed_by(run)] == [6, 9, 10]
    assert trainer.saver.folder.steps() == [6, 9, 10]
    assert merged_metrics(run)[2]["toy/size"] == 1.0
    assert trainer.saver.folder.evaluation(10) == {}


def test_late_results_decide_which_checkpoint_is_best(toy: ModuleType, run: Any) -> None:
    script = {
        "evaluate_every": 2,
        "by_job": True,
        "save_every": None,
        "keep_last": 2,
        "keep_best": "toy/size",
    }
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script(**script))
    fetch = trainer.feed.next

    def fetch_and_settle() -> Any:
        if trainer.progress.step == 9:
            trainer.saver.finish()
            for step, size in ((6, 1.0), (2, 2.0), (4, 3.0), (8, 0.5)):
                settle(toy, run, step, size)
        return fetch()

    trainer.feed.next = fetch_and_settle
    assert trainer.run() is Outcome.FINISHED
    assert trainer.saver.folder.steps() == [4, 10, 12]


def die_once_owed(trainer: Any) -> None:
    """Kill it after the mark of step 6, with no checkpoint of that step or any other."""
    trainer.saver.wishes = lambda at: kill(trainer) if at.evaluated_step == 6 else Wish.NONE


def die_once_durable(trainer: Any) -> None:
    """Kill it as soon as the checkpoint of step 6 is there."""
    finish = trainer.saver.finish

    def finish_and_die() -> None:
        finish()
        if trainer.saver.durable_step == 6:
            kill(trainer)

    trainer.saver.finish = finish_and_die


@pytest.mark.parametrize("save_every", [1, 4])
def test_an_evaluation_left_to_a_job_is_owed_once_whatever_ends_the_training(
    toy: ModuleType, run: Any, save_every: int
) -> None:
    script = {"evaluate_every": 6, "by_job": True, "save_every": save_every}
    for die in (die_once_owed, die_once_durable):
        trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script(**script))
        die(trainer)
        with pytest.raises(Killed):
            trainer.run()
        assert [owed.step for owed in owed_by(run)] == [6]
    (owed,) = owed_by(run)
    assert toy.go(run, **script).outcome is Outcome.FINISHED
    assert [each.step for each in owed_by(run)] == [6, 12]
    assert owed_by(run)[0] == owed


def test_a_step_whose_checkpoint_was_not_written_is_evaluated_by_the_next_one(
    toy: ModuleType, run: Any
) -> None:
    """The save of step 6 fails, and is repeated at step 7; that of step 12 is dropped at a stop."""
    script = {"evaluate_every": 6, "by_job": True, "save_every": None, "steps": 18}
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script(**script, stop_at=13))
    fetch, write = trainer.feed.next, trainer.saver.folder.write

    def fetch_once_written() -> Any:
        if trainer.saver._write:
            trainer.saver._write.join()
        return fetch()

    def writing(contents: Any, tell: Any) -> None:
        if contents.step == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if contents.step == 12:
            raise Dropped
        write(contents, tell)

    trainer.feed.next, trainer.saver.folder.write = fetch_once_written, writing
    assert trainer.run() is Outcome.STOPPED
    assert [owed.step for owed in owed_by(run)] == [7, 14]
    owe(run.newest(), 13)  # left by a kill between the mark and its checkpoint, with a later one durable
    assert toy.go(run, **script).outcome is Outcome.FINISHED
    assert [owed.step for owed in owed_by(run)] == [7, 14, 18]


@pytest.mark.parametrize("repaired", [8, 13])
def test_results_that_could_not_be_written_are_written_later(
    toy: ModuleType, run: Any, caplog: pytest.LogCaptureFixture, repaired: int
) -> None:
    """At the next log step, or at the end of the attempt; the log has them at once."""
    caplog.set_level(logging.INFO, "clipcluster")
    script = {"evaluate_every": 6, "log_every": 2, "steps": 18, "stop_at": 12}
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script(**script))
    fetch, save = trainer.feed.next, trainer.saver.save_and_wait

    def fetch_and_break() -> Any:
        if trainer.progress.step == 3:
            run.evals.rmdir()
            run.evals.write_text("")  # a file where the folder belongs: an OSError, for root too
        if trainer.progress.step == repaired:
            run.evals.unlink()
        return fetch()

    def repair_at_the_end(*given: Any, **named: Any) -> None:
        if repaired == 13:
            run.evals.unlink()
        save(*given, **named)

    trainer.feed.next, trainer.saver.save_and_wait = fetch_and_break, repair_at_the_end
    assert trainer.run() is Outcome.STOPPED
    assert "evaluation at step 6: toy/size" in caplog.text
    lines = {line["step"]: line for line in merged_metrics(run)}
    assert [step for step, line in lines.items() if "toy/size" in line] == [6, 12]
    assert lines[6]["toy/step"] == 6.0
    assert lines[6]["loss"] > 0
    assert [read_json(run.evals / f"step-{step:08d}.json")["step"] for step in (6, 12)] == [6, 12]


@pytest.mark.parametrize("by_job", [True, False])
def test_an_evaluation_without_a_record_is_repeated_by_a_resume(
    toy: ModuleType, run: Any, by_job: bool
) -> None:
    """The disk takes the checkpoint, and neither mark nor results."""
    script = {"evaluate_every": 6, "by_job": by_job, "save_every": None, "keep_best": "toy/size"}
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script(**script, stop_at=6))
    fetch = trainer.feed.next

    def fetch_and_break() -> Any:
        if trainer.progress.step == 3:
            run.evals.rmdir()
            run.evals.write_text("")  # a file where the folder belongs: an OSError, for root too
        return fetch()

    def refuse(step: int, results: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer.feed.next, trainer.saver.folder.record_evaluation = fetch_and_break, refuse
    assert trainer.run() is Outcome.STOPPED
    assert read_json(run.checkpoints / "step-00000006" / "state.json")["evaluated_step"] == 6
    shutil.rmtree(run.checkpoints / "step-00000007")
    run.evals.unlink()
    trainer = toy.go(run, **script)
    assert [owed.step for owed in owed_by(run)] == ([6, 12] if by_job else [])
    assert trainer.evaluations.suite.steps == ([] if by_job else [6, 12])


@pytest.mark.parametrize("by_job", [True, False])
def test_results_of_steps_that_a_roll_back_undid_are_removed(toy: ModuleType, run: Any, by_job: bool) -> None:
    """They were of other weights than those that the run has at these steps now."""
    script = {"poison": [4, 5, 6, 7, 8, 9], "save_every": 3, "limit": 2, "log_every": 9, "steps": 18}
    script |= {"evaluate_every": 3, "by_job": by_job}
    trainer = toy.build(run, toy.claim(run), toy.alone(), Stop(), toy.Script(**script))
    fetch, roll_back, left = trainer.feed.next, trainer._roll_back, []

    def fetch_and_settle() -> Any:
        if by_job and trainer.progress.step == 7 and not left:
            for step, size in ((3, 1.0), (6, 2.0)):
                settle(toy, run, step, size)
        return fetch()

    def roll_back_and_look(streak: Any) -> None:
        roll_back(streak)
        left.extend(sorted(path.name for path in run.evals.iterdir() if path.is_file()))

    trainer.feed.next, trainer._roll_back = fetch_and_settle, roll_back_and_look
    assert trainer.run() is Outcome.FINISHED
    assert left == ["details-00000003.json", "step-00000003.json"]
    if by_job:
        assert [line["step"] for line in merged_metrics(run) if "toy/size" in line] == [3]


def test_a_roll_back_owes_the_evaluations_of_its_steps_anew(toy: ModuleType, run: Any) -> None:
    script = {"poison": [4, 5, 6, 7, 8, 9], "save_every": 3, "limit": 2, "log_every": 9, "steps": 18}
    before: list[Any] = []
    trainer = toy.build(
        run, toy.claim(run), toy.alone(), Stop(), toy.Script(**script, evaluate_every=6, by_job=True)
    )
    restore = trainer.saver.resumed_from

    def look(step: int) -> None:
        before.extend(owed_by(run))
        restore(step)

    owe_of_row: list[Any] = []
    set_aside = trainer.saver.folder.set_aside

    def set_aside_and_look(step: int, reason: str) -> None:
        owe_of_row.extend(owed_by(run))
        set_aside(step, reason)

    trainer.saver.folder.set_aside = set_aside_and_look
    trainer.saver.resumed_from = look
    assert trainer.run() is Outcome.FINISHED
    (undone,) = {owed for owed in owe_of_row if owed.step == 6}
    assert before == []
    assert [owed.step for owed in owed_by(run)] == [6, 12, 18]
    assert undone not in owed_by(run)
