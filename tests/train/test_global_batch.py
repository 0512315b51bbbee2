"""The global batch on any number of ranks: the same recipe gives the same run, accumulated or not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
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
  batch_size: 96
  workers: 0
  image: {{size: 32}}
  text: {{tokenizer: bytes, context_length: 24, captions: random}}
model:
  image: {{timm: convnext_atto, args: {{depths: [1, 1, 1, 1], dims: [8, 16, 24, 32], patch_size: 2}}}}
  text:
    arch: gpt2
    config: {{n_layer: 1, n_head: 2, n_embd: 32, resid_pdrop: 0, embd_pdrop: 0, attn_pdrop: 0}}
  embed_dim: 16
optim: {{lr: 5e-4, clip_norm: 1.0, warmup: 4 steps}}
train: {{duration: 20 steps, micro_batch: 12, log_every: 1 step}}
cluster: {{gpus_per_node: 0, cpus_per_task: 1}}
"""
RANDOM = "model.text.config={n_layer: 1, n_head: 2, n_embd: 32}"  # with dropout
NORM = ("model.image={timm: test_efficientnet}", "train.batch_norm_group=12")  # its norms hold activations
SIGLIP = (
    "loss={name: siglip, chunk: 10}",
    "model.logit_scale={init: 10, max: null}",
    "model.logit_bias={init: -4}",
)
CLASSIFIER = (  # with mixed pairs and augmented images
    *("task=classify", "model.text=null", "model.embed_dim=512", "optim.lr=4e-3", "data.mixup={mode: pair}"),
    *("data.image.augment=rand-m5-inc1", "data.image.random_erasing={}", "loss.label_smoothing=0.1"),
)
SAME = {"whole": ("1", "train.micro_batch=null"), "on-4": ("4",), "on-2": ("2",), "on-1": ("1",)}
RESUMED = (
    *NORM,
    "train.batch_norm_group=4",
    RANDOM,
    "model.image.args={drop_path_rate: 0.2}",
    "train.duration=6 steps",
    "train.activation_checkpointing=true",
)
WORKER = Path(__file__).with_name("runs_of_ranks.py")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert("digits", tmp_path_factory.mktemp("data") / "digits").out


def trained(folder: Path, digits: Path, runs: Mapping[str, tuple[str, ...]]) -> dict[str, Run]:
    """Runs by name, each trained on as many ranks as it says, with its overrides."""
    (folder / "same.yaml").write_text(RECIPE.format(digits=digits))
    made, jobs = {}, []
    for name, (ranks, *changes) in runs.items():
        loaded = load(folder / "same.yaml", changes, {})
        made[name] = Run.create(folder / name, recipe_keys(loaded), settings_keys(loaded))
        jobs.append(f"{made[name].path}:{ranks}")
    done = subprocess.run([sys.executable, str(WORKER), *jobs], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def losses(run: Run) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in merged_metrics(run)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("changes", "others"),
    [
        pytest.param(NORM, ("on-4",), id="grouped norms", marks=pytest.mark.long),
        pytest.param(NORM, ("on-2", "on-1"), id="grouped norms more", marks=pytest.mark.long),
        pytest.param((), ("on-4", "on-2", "on-1"), id="no norms", marks=pytest.mark.long),
        pytest.param(SIGLIP, ("on-4", "on-2"), id="siglip", marks=pytest.mark.long),
        pytest.param(CLASSIFIER, ("on-4", "on-2"), id="a classifier", marks=pytest.mark.long),
    ],
)
def test_a_run_is_the_same_on_any_number_of_ranks(
    tmp_path: Path, digits: Path, changes: tuple[str, ...], others: tuple[str, ...]
) -> None:
    runs = trained(tmp_path, digits, {name: (*SAME[name], *changes) for name in ("whole", *others)})
    expected = losses(runs["whole"])
    assert len(expected) == 20
    assert expected[-5:].mean() < expected[:5].mean() - 0.1  # it learns, so that errors would grow
    for name in others:
        torch.testing.assert_close(losses(runs[name]), expected, rtol=1e-5, atol=0)


@pytest.mark.long
def test_an_accumulated_run_resumes_bit_for_bit(tmp_path: Path, digits: Path) -> None:
    runs = trained(tmp_path, digits, {"whole": ("3", *RESUMED), "stopped": ("3:6", *RESUMED)})
    whole, stopped = runs["whole"], runs["stopped"]
    (resumed,) = [event["step"] for event in events(stopped) if event["event"] == "resume"]
    assert 0 < resumed < 6
    assert torch.equal(losses(stopped), losses(whole))
    for file in ("model", "optimizer"):
        found, expected = (
            load_file(run.checkpoints / "step-00000006" / f"{file}.safetensors") for run in (stopped, whole)
        )
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
