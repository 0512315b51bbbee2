"""Samples of every kind, good and bad, through the loader: each is used, or counted once with its reason."""

import errno
import io
import os
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipcluster.data.loading.loader import Loader
from clipcluster.data.sampling.sampler import Sampler
from clipcluster.data.shards import opened as shards_module
from clipcluster.data.shards.dataset import Dataset
from clipcluster.data.shards.indexing import index_folder
from clipcluster.data.shards.open import open_folder
from clipcluster.data.tokenizer import ByteTokenizer
from clipcluster.recipe.sections.data import Data
from tests.data.sources import sampler_source

TOKENIZER = ByteTokenizer(24)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def saved(kind: str, image: Image.Image = NOISE, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def good_and_bad() -> dict[str, tuple[str, bytes, str | None]]:
    """Key to extension, bytes and a word of the reason (None: good)."""
    jpeg, gif = saved("JPEG"), saved("GIF", save_all=True, append_images=[NOISE.rotate(90)])
    frame = bytearray(jpeg)
    at = jpeg.index(b"\xff\xc0")
    frame[at + 5 : at + 9] = b"\x7f\xff\x7f\xff"
    clear = NOISE.copy()
    clear.putalpha(100)
    return {
        "jpeg": ("jpg", jpeg, None),
        "grey": ("jpg", saved("JPEG", NOISE.convert("L")), None),
        "cmyk": ("jpg", saved("JPEG", NOISE.convert("CMYK")), None),
        "progressive": ("jpg", saved("JPEG", progressive=True), None),
        "gif-as-jpg": ("jpg", gif, None),
        "webp-as-png": ("png", saved("WEBP"), None),
        "alpha": ("png", saved("PNG", clear), None),
        "palette": ("png", saved("PNG", NOISE.convert("P")), None),
        "bmp": ("bmp", saved("BMP"), None),
        "tiff": ("tif", saved("TIFF"), None),
        "empty": ("jpg", b"", "empty file"),
        "html": ("jpg", b"<!doctype html><html>not found</html>", "HTML"),
        "cut-jpeg": ("jpg", jpeg[: len(jpeg) // 2], "truncated"),
        "cut-jpeg-with-end": ("jpg", jpeg[: len(jpeg) // 2] + b"\xff\xd9", "truncated"),
        "cut-png": ("png", saved("PNG")[:-20], "truncated"),
        "bomb": ("jpg", bytes(frame), "too many"),
        "text": ("webp", b"just words", "no known kind"),
    }


@pytest.fixture
def mixed(tmp_path: Path) -> Dataset:
    """One shard of everything, written by tarfile; one sample has no caption, and one key comes twice."""
    files = [(f"{key}.{extension}", data) for key, (extension, data, _) in good_and_bad().items()] + [
        ("silent.jpg", saved("JPEG")),
        ("jpeg.jpg", saved("JPEG", NOISE.rotate(90))),
    ]
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in files:
            key = name.rpartition(".")[0]
            members = [(name, data)] + ([] if key == "silent" else [(f"{key}.txt", f"a {key}".encode())])
            for member, content in members:
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    index_folder(tmp_path)
    return open_folder(tmp_path)


def sampler_of(shards: Dataset, batch_size: int = 8) -> Sampler:
    shape = sampler_source(shards.sample_counts, shards.caption_counts())
    return Sampler([shape], batch_size=batch_size, seed=3, captions="first")


def passes(shards: Dataset, section: Data, workers: int, batches: int) -> tuple[list[str], list[dict]]:
    """Keys used and bad samples told in so many batches."""
    loader = Loader([shards], sampler_of(shards), section, tokenizer=TOKENIZER, seed=0, workers=workers)
    with closing(loader):
        taken = [next(loader) for _ in range(batches)]
    assert all(torch.isfinite(batch.images.float()).all() for batch in taken)
    return [key for batch in taken for _, _, key in batch.keys], [bad for batch in taken for bad in batch.bad]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_is_used_or_counted_once(
    mixed: Dataset, data_section: Callable[..., Data], workers: int
) -> None:
    kinds = good_and_bad()
    used, bad = passes(mixed, data_section(), workers, 3 * 17 // 8)
    reasons = {entry["key"]: entry["reason"] for entry in bad}
    assert len(bad) == len(reasons)
    assert set(reasons) == {key for key, (_, _, reason) in kinds.items() if reason}
    for key, (_, _, reason) in kinds.items():
        if reason:
            assert reason in reasons[key], key
    assert set(used) == {key for key, (_, _, reason) in kinds.items() if reason is None}
    assert len(used) == 8 * (3 * 17 // 8)  # replaced, never left out


def test_a_disk_that_fails_is_no_bad_sample(
    mixed: Dataset, data_section: Callable[..., Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "RETRIES", (0.0, 0.0))
    read, left = os.pread, 2

    def failing(fd: int, size: int, offset: int) -> bytes:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.EIO, "Input/output error")
        return read(fd, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    loader = Loader([mixed], sampler_of(mixed, 1), data_section(1), tokenizer=TOKENIZER, seed=0)
    first = next(loader)  # the third try succeeds
    assert left < 0
    assert not any("Input" in entry["reason"] for entry in first.bad)
    left = 10**9
    with pytest.raises(OSError, match=r"00000\.tar.*Input/output error.*tried 3 times"):
        next(loader)
