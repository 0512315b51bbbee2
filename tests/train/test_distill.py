"""Distillation with all real parts: trained on 3 ranks, stopped, resumed and measured."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipcluster.errors import UserError
from clipcluster.recipe.load import load, recipe_keys, settings_keys
from clipcluster.run import evaluate, train
from clipcluster.runs.files import read_json
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import events, merged_metrics
from clipcluster.runtime.launch import Launch
from clipcluster.runtime.outcome import Outcome
from clipcluster.runtime.stop import Stop
from tests.reinforced_shards import WIDTH, write

RECIPE = f"""
name: student
task: distill
distill: {{{{weight: 0.75, stored: {{{{widths: [{WIDTH}, {WIDTH}]}}}}}}}}
data:
  train: [{{{{shards: {{shards}}}}}}]
  batch_size: 12
  workers: 0
  image: {{{{size: 32}}}}
  text: {{{{tokenizer: bytes, context_length: 40}}}}
model:
  image: {{{{timm: convnext_atto, args: {{{{depths: [1, 1, 1, 1], dims: [8, 16, 24, 32], patch_size: 2,
          drop_path_rate: 0.2}}}}}}}}
  text: {{{{arch: gpt2, config: {{{{n_layer: 1, n_head: 2, n_embd: 32}}}}}}}}
  embed_dim: 16
optim: {{{{lr: 1e-3, clip_norm: 1.0, warmup: 2 steps}}}}
train: {{{{duration: 4 steps, micro_batch: 2, log_every: 1 step, ema: {{{{decay: 0.9}}}}}}}}
evaluate: {{{{retrieval: ["{{shards}}"]}}}}
cluster: {{{{gpus_per_node: 0, cpus_per_task: 1}}}}
"""
WORKER = Path(__file__).with_name("runs_of_ranks.py")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    file = folder / "student.yaml"
    file.write_text(RECIPE.format(shards=write(folder / "shards", 36)))
    return file


def test_a_resume_in_the_middle_equals_the_uninterrupted_run(recipe: Path) -> None:
    """On 3 ranks, accumulated; with dropout and drop path, both captions, and a moving average."""
    loaded = load(recipe, (), {})
    whole, stopped = (
        Run.create(recipe.parent / name, recipe_keys(loaded), settings_keys(loaded))
        for name in ("uninterrupted", "stopped")
    )
    jobs = [f"{whole.path}:3", f"{stopped.path}:3:4"]
    done = subprocess.run([sys.executable, str(WORKER), *jobs], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (resumed,) = [event["step"] for event in events(stopped) if event["event"] == "resume"]
    assert 0 < resumed < 4
    lines = [
        [(line["loss"], line["distill_loss"], line["contrastive_loss"]) for line in merged_metrics(run)]
        for run in (stopped, whole)
    ]
    assert len(lines[0]) == 4
    assert lines[0] == lines[1]
    for file in ("model", "ema", "optimizer"):
        found, expected = (
            load_file(run.checkpoints / "step-00000004" / f"{file}.safetensors") for run in (stopped, whole)
        )
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    results = read_json(whole.path / "evals/step-00000004.json")
    assert results["metrics"]["shards/images"] == 36


class Distilled:
    """A teacher's run, and a student's of another width, pixels and context."""

    def __init__(self, recipe: Path, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.teacher = self.run(
            "teacher", "task=contrastive", "distill=null", "train.duration=1 step", "seed=1"
        )

    def run(self, name: str, *overrides: str) -> Run:
        common = (
            "evaluate.retrieval=[]",
            "train.micro_batch=6",
            "optim.warmup=0 steps",
            "model.image.args.drop_path_rate=0",
        )
        loaded = load(self.recipe, (*common, *overrides), {})
        run = Run.create(self.folder / name, recipe_keys(loaded), settings_keys(loaded))
        self.go(run)
        return run

    def go(self, run: Run) -> None:
        attempt = run.claim("test", host="here", still_running=lambda job: False)
        launch = Launch(0, 1, 0, 1, 0, 1, "test", "single")
        assert train(run, attempt, launch, Stop()) == Outcome.FINISHED


@pytest.fixture(scope="module")
def taught(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    return Distilled(recipe, tmp_path_factory.mktemp("taught"))


def test_a_student_of_a_run_and_of_a_model_with_weights(taught: Distilled) -> None:
    """Teachers are in no checkpoint, and neither they nor projections are needed to measure the student."""
    weights = taught.teacher.checkpoints / "step-00000001" / "ema.safetensors"
    before = weights.read_bytes()
    teachers = [
        {"run": str(taught.teacher.path)},
        {
            "model": {
                **load(taught.recipe, (), {}).recipe.model.model_dump(mode="json"),
                "weights": str(weights),
            },
            "text": {"context_length": 30},
            "image": {"mean": [0.5, 0.5, 0.5]},
        },
    ]
    section = {"weight": 1.0, "contrastive": 1.0, "feature_mse": 20.0, "teachers": teachers}
    student = taught.run(
        "student", f"distill={json.dumps(section)}", "model.embed_dim=12", "train.duration=2 steps"
    )
    newest = student.checkpoints / "step-00000002"
    names = set(load_file(newest / "model.safetensors"))
    projections = {f"teacher_projections.{side}-{n}.weight" for side in ("image", "text") for n in range(2)}
    assert {name for name in names if "teacher" in name} == projections
    assert load_file(newest / "ema.safetensors").keys() == names
    hashes = read_json(newest / "state.json")["starting_weights"]
    assert hashes == dict.fromkeys(("teacher 0", "teacher 1"), hashlib.sha256(before).hexdigest())
    assert weights.read_bytes() == before
    first, last = merged_metrics(student)[0], merged_metrics(student)[-1]
    assert first["feature_mse"] != last["feature_mse"]

    again = taught.run(
        "again", "task=contrastive", "distill=null", "model.embed_dim=12", f"model.weights={student.path}",
        "train.duration=1 step", "optim.lr=0",
    )  # fmt: skip
    started = load_file(again.checkpoints / "step-00000001" / "model.safetensors")
    average = load_file(newest / "ema.safetensors")
    assert set(started) == names - projections
    assert all(torch.equal(tensor, average[name]) for name, tensor in started.items())

    taught.teacher.path.rename(taught.folder / "moved")
    results = evaluate(student.path, overrides=[f"evaluate.retrieval=[{taught.recipe.parent}/shards]"])
    assert results["metrics"]["shards/images"] == 36
    with pytest.raises(UserError, match="neither the folder of a run nor of one of its checkpoints"):
        taught.run("other", f"distill={json.dumps({'teachers': teachers[:1]})}")
