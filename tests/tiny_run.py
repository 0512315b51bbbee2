"""A run folder as training leaves it, with a small model that was never trained, for what uses models."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clipcluster.build.model import build_model
from clipcluster.data.tokenizer import load_tokenizer
from clipcluster.recipe.load import from_run, load, recipe_keys, settings_keys
from clipcluster.runs.folder import Run
from clipcluster.train.checkpoint import CheckpointFolder
from clipcluster.train.checkpoint_writer import take_copy
from clipcluster.train.progress import Progress
from tests.shard_writer import ShardWriter

RECIPE = """
name: tiny
data:
  train: [{{shards: {shards}}}]
  batch_size: 4
  workers: 0
  image: {{size: 32}}
  text: {{tokenizer: bytes, context_length: 24}}
model:
  image: {{timm: convnext_atto, args: {{depths: [1, 1, 1, 1], dims: [8, 16, 24, 32], patch_size: 2}}}}
  text: {{arch: gpt2, config: {{n_layer: 1, n_head: 2, n_embd: 32}}}}
  embed_dim: 16
optim: {{lr: 1e-3}}
train: {{duration: 8 steps, ema: {{decay: 0.9}}}}
evaluate: {{retrieval: [{shards}], zero_shot: [{shards}], batch_size: 8}}
cluster: {{gpus_per_node: 0, cpus_per_task: 1}}
"""
NAMES = ("cat", "dog", "owl", "bee")


def picture(number: int, size: tuple[int, int] = (40, 36), kind: str = "PNG") -> bytes:
    """The bytes of a small coloured image, smooth enough to survive resizing; (width, height) pixels."""
    corners = np.random.default_rng(number).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def captions(number: int) -> list[str]:
    return [f"a {NAMES[number % 4]} number {number}", f"picture {number}"]


def write_shards(folder: Path, count: int = 10, per_shard: int = 4) -> Path:
    """Indexed shards of `count` pictures with two captions and a class each, names and templates beside."""
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for number in range(count):
            writer.add(f"s{number:03d}", picture(number), "png", captions(number), cls=number % 4)
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in NAMES))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\na photo of a {c}.\n")
    return folder


def write_run(folder: Path, shards: Path, *overrides: str, steps: Sequence[int] = (3, 8)) -> Run:
    """A run of `RECIPE` with a checkpoint at each step, whose average differs from its weights."""
    file = folder.parent / "tiny.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(RECIPE.format(shards=shards))
    loaded = load(file, overrides, {})
    run = Run.create(folder, recipe_keys(loaded), settings_keys(loaded))
    attempt = run.claim("test", host="here", still_running=lambda job: False)
    recipe = from_run(run.recipe(), run.settings())
    checkpoints = CheckpointFolder(attempt, {"recipe": recipe.model_dump(mode="json")})
    checkpoints.prepare()
    progress = Progress(steps_per_epoch=2, batch_size=4)
    tokenizer = load_tokenizer(recipe.data.text) if recipe.task != "classify" else None
    for step in steps:
        progress.step = progress.batches_drawn = step
        parts = {
            name: build_model(recipe.model_copy(update={"seed": step + more}), tokenizer, None)
            for name, more in (("model", 0), ("ema", 100))
        }
        checkpoints.write(take_copy(step, progress.state_dict(), parts))
    return run
