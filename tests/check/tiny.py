"""A recipe of tiny towers, and shards for it."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

RECIPE = """\
name: tiny
data:
  train:
    - {shards: data/train}
  batch_size: 4
  image: {size: 32}
  text: {context_length: 16}
  workers: 1
model:
  image: {timm: test_convnext}
  text: {arch: gpt2, config: {n_layer: 1, n_head: 2, n_embd: 16}}
  embed_dim: 16
optim: {lr: 1e-3}
train: {duration: 10 epochs}
evaluate: {retrieval: [data/test], zero_shot: [data/test]}
cluster: {gpus_per_node: 0, tasks_per_node: 2, cpus_per_task: 2}
checks: {allow: [text-from-scratch]}
"""


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def write_shard(path: Path, count: int, broken: int = 0, classes: int = 2) -> None:
    """`count` samples, two captions each (the last one none); the first `broken` of them are no images.

    classes: 0 for samples without one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            captions = [f"sample {number}", f"number {number}"] if number < count - 1 else []
            members = {
                "png": b"no image" if number < broken else png(number),
                "json": json.dumps({"captions": captions}).encode(),
                **({"cls": str(number % classes).encode()} if classes else {}),
            }
            for extension, content in members.items():
                entry = tarfile.TarInfo(f"{number:04d}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
