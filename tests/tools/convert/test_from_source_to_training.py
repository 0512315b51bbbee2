"""From data as it is published, by the command, into shards, and from these into ten steps of training."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from clipcluster.data.shards.open import open_folder
from clipcluster.recipe.load import load, recipe_keys, settings_keys
from clipcluster.run import train
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics
from clipcluster.runtime.launch import Launch
from clipcluster.runtime.outcome import Outcome
from clipcluster.runtime.stop import Stop
from tests.consumed import merged_samples

ROOT = Path(__file__).resolve().parents[3]
STEPS = 10
RECIPE = """
name: tiny
data:
  train: [{source}]
  batch_size: 2
  workers: 1
  image: {{size: 32}}
  text: {{tokenizer: bytes, context_length: 40, captions: {captions}}}
model:
  image: {{timm: convnext_atto, args: {{depths: [1, 1, 1, 1], dims: [4, 8, 8, 8], patch_size: 2}}}}
  text: {{arch: gpt2, config: {{n_layer: 1, n_head: 2, n_embd: 16}}}}
  embed_dim: 8
optim: {{lr: 1e-3, warmup: 2 steps}}
train: {{duration: {steps} steps, log_every: 1 steps, record_samples: true}}
checkpoint: {{every: 100 steps}}
cluster: {{gpus_per_node: 0, cpus_per_task: 1}}
"""
ALONE = Launch(0, 1, 0, 1, 0, 1, "test", "single")


class Way(NamedTuple):
    """`command` after `clipcluster shards`; `shards`: the folder to train on, with so many `samples`."""

    command: list[str | Path]
    shards: Path
    samples: int
    captions: str = "all"
    captions_in: str = ""


def _coco(request: pytest.FixtureRequest, folder: Path) -> Way:
    zips = request.getfixturevalue("coco").zips(folder / "coco")
    return Way(["convert", "coco", zips, "--out", folder / "out"], folder / "out" / "train", 6)


def _folder(request: pytest.FixtureRequest, folder: Path) -> Way:
    for number in range(6):
        path = folder / "images" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(request.getfixturevalue("picture")(number, "PNG"))
    command = ["convert", "folder", folder / "images", "--template", "a photo of a {c}."]
    return Way([*command, "--out", folder / "out"], folder / "out", 6)


def _csv(request: pytest.FixtureRequest, folder: Path) -> Way:
    (folder / "images").mkdir()
    rows = ["filepath\ttitle"]
    for number in range(5):
        (folder / "images" / f"{number}.png").write_bytes(request.getfixturevalue("picture")(number, "PNG"))
        rows += [f"images/{number}.png\tcaption {text} of {number}" for text in range(3)]
    (folder / "pairs.tsv").write_text("\n".join([*rows, "images/gone.png\tof nothing"]))
    return Way(["convert", "csv", folder / "pairs.tsv", "--out", folder / "out"], folder / "out", 5)


def _chinese_clip(request: pytest.FixtureRequest, folder: Path) -> Way:
    files = request.getfixturevalue("chinese_clip").files(folder / "files", "train")
    command = ["convert", "chinese-clip", files, "--out", folder / "out"]
    return Way(command, folder / "out" / "train", 4, captions="random")


def _lmdb(request: pytest.FixtureRequest, folder: Path) -> Way:
    databases = request.getfixturevalue("chinese_clip").lmdb(folder / "files", "train")
    return Way(["convert", "lmdb", databases, "--out", folder / "out"], folder / "out" / "train", 4)


def _parquet(request: pytest.FixtureRequest, folder: Path) -> Way:
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = request.getfixturevalue("picture")
    rows = [
        {"jpg": picture(number), "caption": f"caption of {number}", "key": str(number)} for number in range(5)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet", row_group_size=2)
    return Way(["convert", "parquet", folder / "00000.parquet", "--out", folder / "out"], folder / "out", 5)


def _img2dataset(request: pytest.FixtureRequest, folder: Path) -> Way:
    downloads = request.getfixturevalue("downloads").make(folder / "downloads")
    return Way(["convert", "img2dataset", downloads, "--out", folder / "out"], folder / "out", 12)


def _img2dataset_as_it_lies(request: pytest.FixtureRequest, folder: Path) -> Way:
    downloads = request.getfixturevalue("downloads").make(folder / "downloads")
    return Way(["index", downloads], downloads, 12)


def _datacomp_by_uid(request: pytest.FixtureRequest, folder: Path) -> Way:
    made = request.getfixturevalue("downloads")
    (folder / "uids.txt").write_text("".join(f"{made.uid(number)}\n" for number in (7, 0, 8, 7)))
    command = ["convert", "img2dataset", made.make(folder / "pool"), "--uids", folder / "uids.txt"]
    return Way([*command, "--out", folder / "out"], folder / "out", 4)


def _datacompdr(request: pytest.FixtureRequest, folder: Path) -> Way:
    made = request.getfixturevalue("datacompdr")
    images = made.images(folder / "images", {0: [1, 2, 3], 1: [4, 5]})
    stored = made.reinforcements(folder / "dr", {0: [3, 2, 1, 0], 1: [5, 4]}, "pth.gz")
    return Way(["convert", "datacompdr", images, stored, "--out", folder / "out"], folder / "out", 5)


def _clip_benchmark_as_it_lies(request: pytest.FixtureRequest, folder: Path) -> Way:
    root = request.getfixturevalue("clip_benchmark").retrieval(folder / "wds_flickr")
    return Way(["index", root / "test"], root / "test", 12)


def _clip_benchmark_classes(request: pytest.FixtureRequest, folder: Path) -> Way:
    root = request.getfixturevalue("clip_benchmark").classification(folder / "wds_pets")
    command = ["convert", "webdataset", root, "--template", "a photo of a {c}.", "--out", folder / "out"]
    return Way(command, folder / "out" / "train", 24)


def _timm_imagenet(request: pytest.FixtureRequest, folder: Path) -> Way:
    tars = request.getfixturevalue("timm_imagenet")(folder / "imagenet")
    (folder / "names.txt").write_text("tench\ngoldfish\ngreat white shark\n")
    command = ["convert", "webdataset", tars, "--classnames", folder / "names.txt", "--template", "{c}"]
    return Way([*command, "--out", folder / "out"], folder / "out" / "train", 10)


WAYS: dict[str, Callable[[pytest.FixtureRequest, Path], Way]] = {
    "coco": _coco,
    "folder": _folder,
    "csv": _csv,
    "chinese-clip": _chinese_clip,
    "lmdb": _lmdb,
    "parquet": _parquet,
    "img2dataset": _img2dataset,
    "img2dataset, as it lies": _img2dataset_as_it_lies,
    "DataComp by uid": _datacomp_by_uid,
    "datacompdr": _datacompdr,
    "CLIP_benchmark, as it lies": _clip_benchmark_as_it_lies,
    "CLIP_benchmark, classes": _clip_benchmark_classes,
    "timm's ImageNet": _timm_imagenet,
}
# The others are long: `make test-all`.
SHORT = {"coco", "img2dataset, as it lies", "datacompdr", "timm's ImageNet"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in WAYS]
)
def test_ten_steps(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    way = WAYS[name](request, tmp_path)
    command = [sys.executable, "-m", "jobs.cli", "shards", *map(str, way.command)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shards = open_folder(way.shards)
    assert shards.n_samples == way.samples
    keys = {shards.read(position).key for position in range(way.samples)}

    source = {"shards": str(way.shards), **({"captions_in": way.captions_in} if way.captions_in else {})}
    (tmp_path / "tiny.yaml").write_text(
        RECIPE.format(source=json.dumps(source), captions=way.captions, steps=STEPS)
    )
    loaded = load(tmp_path / "tiny.yaml", [], {})
    run = Run.create(tmp_path / "run", recipe_keys(loaded), settings_keys(loaded))
    attempt = run.claim("test", host="here", still_running=lambda job: False)
    assert train(run, attempt, ALONE, Stop()) is Outcome.FINISHED
    lines = merged_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) for line in lines)
    seen = [line["key"] for line in merged_samples(run)]
    assert len(seen) == STEPS * 2
    assert set(seen) <= keys
    assert not list(attempt.path.glob("bad_samples-*.jsonl"))
