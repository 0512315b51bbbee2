"""The global batch on any number of ranks: the same recipe gives the same run, accumulated or not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipcluster.recipe.load import load, recipe_keys, settings_keys
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import events, merged_metrics
from tools.convert.convert import convert

RECIPE = """
name: same
data:
  train: [{{shards: {digits}/train}}]
  batch_size: 24
  workers: 0
  image: {{size: 32}}
  text: {{tokenizer: bytes, context_length: 24, captions: random}}
model:
  image: {{timm: convnext_atto, args: {{depths: [1, 1, 1, 1], dims: [8, 16, 24, 32], patch_size: 2}}}}
  text:
    arch: gpt2
    config: {{n_layer: 1, n_head: 2, n_embd: 32, resid_pdrop: 0, embd_pdrop: 0, attn_pdrop: 0}}
  embed_dim: 16
optim: {{lr: 1e-3, clip_norm: 1.0, warmup: 4 steps}}
train: {{duration: 20 steps, micro_batch: 3, log_every: 1 step}}
cluster: {{gpus_per_node: 0, cpus_per_task: 1}}
"""
RANDOM = "model.text.config={n_layer: 1, n_head: 2, n_embd: 32}"  # with dropout
RUNS = {  # name: ranks, questions before a stop, overrides
    "whole": ("1", "train.micro_batch=null"),
    "on-4": ("4",),
    "on-2": ("2",),
    "on-1": ("1",),
    "uninterrupted": ("3",),
    "stopped": ("3:6",),
}
RESUMED = (RANDOM, "train.duration=6 steps", "model.image.args.drop_path_rate=0.2", "train.micro_batch=2")
WORKER = Path(__file__).with_name("runs_of_ranks.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Every run, trained by the ranks it says."""
    folder = tmp_path_factory.mktemp("global")
    (folder / "same.yaml").write_text(RECIPE.format(digits=convert("digits", folder / "digits").out))
    made, jobs = {}, []
    for name, (ranks, *changes) in RUNS.items():
        changes += RESUMED if ranks.startswith("3") else ()
        loaded = load(folder / "same.yaml", changes, {})
        made[name] = Run.create(folder / name, recipe_keys(loaded), settings_keys(loaded))
        jobs.append(f"{made[name].path}:{ranks}")
    done = subprocess.run([sys.executable, str(WORKER), *jobs], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def losses(run: Run) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in merged_metrics(run)], dtype=torch.float64)


def test_a_run_is_the_same_on_4_2_and_1_ranks(runs: dict[str, Run]) -> None:
    expected = losses(runs["whole"])
    assert len(expected) == 20
    assert expected[-5:].mean() < expected[:5].mean() - 0.1  # it learns, so that errors would grow
    for name in ("on-4", "on-2", "on-1"):
        torch.testing.assert_close(losses(runs[name]), expected, rtol=1e-5, atol=0)


def test_an_accumulated_run_resumes_bit_for_bit(runs: dict[str, Run]) -> None:
    whole, stopped = runs["uninterrupted"], runs["stopped"]
    (resumed,) = [event["step"] for event in events(stopped) if event["event"] == "resume"]
    assert 0 < resumed < 6
    assert torch.equal(losses(stopped), losses(whole))
    for file in ("model", "optimizer"):
        found, expected = (
            load_file(run.checkpoints / "step-00000006" / f"{file}.safetensors") for run in (stopped, whole)
        )
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
