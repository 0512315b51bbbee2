"""Shards in DataCompDR's layout, joined with their images, made up for tests."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipcluster.data.shards.indexing import index_folder
from tests.shard_writer import ShardWriter

AUGMENTATIONS, SYNTHETIC, WIDTH = 4, 5, 6
"""Of each sample: the published have 30 or 10, 5 and 768."""
SYN = "syn.json:syn_text"
MAGNITUDES = (0, 0.09, 0.09, 30.453, 30.453, 9, 0.27, 0.27, 0.27, 0.27, 7, 178.5, 0, 0)


def picture(number: int, height: int = 40, width: int = 56) -> np.ndarray:
    """(H, W, 3) uint8, smooth enough that every operation changes it."""
    numbers = np.random.default_rng(number)
    coarse = numbers.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def param_aug(number: int, height: int = 40, width: int = 56) -> list[Any]:
    """As DataCompDR writes it: a crop, then two operations of all fourteen with their final magnitudes."""
    numbers = np.random.default_rng([number, 1])
    entries = []
    for _ in range(AUGMENTATIONS):
        h, w = int(numbers.integers(8, height)), int(numbers.integers(8, width))
        crop = [int(numbers.integers(0, height - h + 1)), int(numbers.integers(0, width - w + 1)), h, w]
        operations = []
        for operation in numbers.integers(0, 14, 2).tolist():
            signed = 1 <= operation <= 9 and numbers.random() < 0.5
            operations.append([operation, -MAGNITUDES[operation] if signed else MAGNITUDES[operation]])
        entries.append([crop, operations])
    return entries


def embeddings(number: int) -> dict[str, np.ndarray]:
    """`image_emb` (4, 12) and `text_emb` (6, 12) float32: two teachers' halves, each of length one."""
    numbers = np.random.default_rng([number, 2])
    found = {}
    for name, rows in (("image_emb", AUGMENTATIONS), ("text_emb", 1 + SYNTHETIC)):
        halves = numbers.normal(size=(rows, 2, WIDTH))
        found[name] = (halves / np.linalg.norm(halves, axis=2, keepdims=True)).reshape(rows, -1)
    return {name: array.astype(np.float32) for name, array in found.items()}


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def pth_gz(arrays: dict[str, np.ndarray]) -> bytes:
    """As the edition in bfloat16 has them."""
    file = io.BytesIO()
    torch.save({name: torch.from_numpy(array).bfloat16() for name, array in arrays.items()}, file)
    return gzip.compress(file.getvalue(), 1)


def members(number: int) -> dict[str, bytes]:
    """A sample's members; every third in bfloat16, every fourth with its augmentations as text."""
    file = io.BytesIO()
    Image.fromarray(picture(number)).save(file, "PNG")
    augmentations: Any = param_aug(number)
    synthetic = [f"synthetic {index} of picture {number}" for index in range(SYNTHETIC)]
    stored = ("pth.gz", pth_gz) if number % 3 == 2 else ("npz", npz)
    return {
        "png": file.getvalue(),
        "txt": b"picture %d" % number,
        "json": json.dumps({"uid": f"{number:032x}", "original_width": 56, "original_height": 40}).encode(),
        "syn.json": json.dumps({"syn_text": synthetic}).encode(),
        "paug.json": json.dumps(
            {"param_aug": json.dumps(augmentations) if number % 4 == 3 else augmentations}
        ).encode(),
        stored[0]: stored[1](embeddings(number)),
    }


def write(folder: Path, samples: int, *, per_shard: int = 10) -> Path:
    """An indexed folder of `samples` samples; the key of number n is n in 32 hexadecimal digits."""
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for number in range(samples):
            writer.add_members(f"{number:032x}", members(number))
    index_folder(folder, captions_choice=SYN)
    return folder
