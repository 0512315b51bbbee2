"""A classifier trained on real digits with mixup, augmentation and a moving average, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipcluster.build.training import try_task
from clipcluster.recipe.load import load, recipe_keys, settings_keys
from clipcluster.run import evaluate, train
from clipcluster.runs.files import read_json
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics
from clipcluster.runtime.launch import Launch
from clipcluster.runtime.outcome import Outcome
from clipcluster.runtime.stop import Stop
from tests.stop_after import StopAfter
from tools.convert.convert import convert

RECIPE = """
name: classifier
task: classify
data:
  train: [{{shards: {digits}/train}}]
  batch_size: 64
  workers: 0
  image:
    size: 32
    crop_scale: [0.8, 1.0]
    evaluation: {{resize: squash, crop_pct: 0.9}}
    random_erasing: {{probability: 0.1, mode: const}}
  mixup: {{alpha: 0.2, cutmix: 0.0, mode: pair}}
model:
  image:
    timm: convnext_atto
    args: {{depths: [1, 1, 1, 1], dims: [16, 32, 48, 64], patch_size: 2, drop_path_rate: 0.05}}
loss: {{label_smoothing: 0.05}}
optim: {{lr: 3e-3, weight_decay: 0.05, clip_norm: 1.0, warmup: 2 steps}}
train: {{duration: 4 epochs, log_every: 10 steps, ema: {{decay: 0.95}}}}
checkpoint: {{every: 100 epochs, keep: {{best: {{metric: test/top1}}}}}}
evaluate: {{every: 24 steps, classification: [{digits}/test]}}
cluster: {{gpus_per_node: 0, cpus_per_task: 1}}
"""
ALONE = Launch(0, 1, 0, 1, 0, 1, "test", "single")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """make(name, *overrides): a run folder of the recipe on the handwritten digits."""
    folder = tmp_path_factory.mktemp("classification")
    digits = convert("digits", folder / "digits").out
    file = folder / "classifier.yaml"
    file.write_text(RECIPE.format(digits=digits))

    def make(name: str, *overrides: str) -> Run:
        loaded = load(file, overrides, {})
        return Run.create(folder / "runs" / name, recipe_keys(loaded), settings_keys(loaded))

    make.file = file  # type: ignore[attr-defined]
    return make


def go(run: Run, stop: Stop | None = None) -> Outcome:
    return train(run, run.claim("test", host="here", still_running=lambda job: False), ALONE, stop or Stop())


def weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoints / f"step-{step:08d}" / "model.safetensors")


def test_the_accuracy_rises_and_the_average_is_measured_too(made: Any) -> None:
    run = made("whole")
    assert go(run) is Outcome.FINISHED
    found = [read_json(path)["metrics"] for path in sorted(run.evals.glob("step-*.json"))]
    assert len(found) == 4
    for metric in ("test/top1", "test/raw_top1"):
        values = [result[metric] for result in found]
        assert values[0] < values[1] < values[-1]
        assert values[-1] > 0.85
    assert found[-1]["test/top1"] != found[-1]["test/raw_top1"]
    assert found[-1]["test/loss"] < found[0]["test/loss"]
    assert found[-1]["test/classified_images"] == 360
    steps = [line["step"] for line in merged_metrics(run)]
    assert steps[-1] == 88
    names = set(weights(run, 88))
    assert {"head.weight", "head.bias"} < names
    assert all(name.startswith(("image.trunk.", "head.")) for name in names)
    again = evaluate(run.path)
    assert again["ema"]
    assert again["metrics"]["test/top1"] == found[-1]["test/top1"]


def test_a_resumed_run_equals_the_uninterrupted_one(made: Any) -> None:
    short = ("train.duration=8 steps", "evaluate.every=null", "data.image.augment=rand-m9-mstd0.5-inc1")
    whole = made("uninterrupted", *short)
    assert go(whole) is Outcome.FINISHED
    stopped = made("stopped", *short)
    assert go(stopped, StopAfter(6)) is Outcome.STOPPED
    assert go(stopped) is Outcome.FINISHED
    expected, found = weights(whole, 8), weights(stopped, 8)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_micro_batch_changes_nothing(made: Any) -> None:
    """Mixed pairs and augmented pixels are the same; without drop path the weights are, to rounding."""
    short = ("train.duration=4 steps", "evaluate.every=null", "model.image.args.drop_path_rate=0.0")
    whole, parts = made("one", *short), made("four", *short, "train.micro_batch=16")
    assert go(whole) is Outcome.FINISHED
    assert go(parts) is Outcome.FINISHED
    losses = [[line["loss"] for line in merged_metrics(run)] for run in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_it_can_be_tried_before_it_is_queued(made: Any) -> None:
    assert try_task(load(Path(made.file), [], {}).recipe, None) == []
