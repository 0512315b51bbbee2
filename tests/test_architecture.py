"""docs/architecture.md: the files it names are there, and a new task needs no other file than it says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shard_writer import ShardWriter
from tools.convert.readers.digits import KIND as DIGITS
from tools.convert.records import NoOptions

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROOMS = ("clipcluster", "jobs", "tools", "recipes", "docs")

TASK = '''"""A toy task: pairs count as much as the number that lies beside them says."""

from clipcluster.data.loading.batch import normalise
from clipcluster.model.task import Report, Task


class WeightedPairs(Task):
    """The mean of weight x (1 - cosine) over the pairs of a batch."""

    def __init__(self, model, image):
        super().__init__()
        self.model, self.image = model, image

    def encode(self, batch):
        images = normalise(batch.images, self.image.mean, self.image.std)
        return {
            "image": self.model.encode_image(images),
            "text": self.model.encode_text(batch.tokens, batch.mask),
            "weight": batch.extras["weight.txt"],
        }

    def loss(self, features):
        cosine = (features["image"] * features["text"]).sum(dim=1)
        weight = features["weight"].to(cosine)
        loss = (weight * (1 - cosine)).mean() + 0 * self.model.logit_scale.sum()
        return Report(loss, {"loss": loss.detach(), "mean_weight": weight.mean()})


def build_weighted_pairs(recipe, model, ranks, assets):
    """`task: weighted_pairs`."""
    return WeightedPairs(model, recipe.data.image)
'''
ENTRY = """    "weighted_pairs": TaskSpec(
        builder="clipcluster.model.weighted_pairs:build_weighted_pairs",
        model="clipcluster.model.clip:build_clip",
        loss_over="sample",
        captions=True,
        members=lambda recipe: {"weight.txt": "clipcluster.data.loading.decoders:number"},
        evaluations=("zero_shot",),
    ),
}

KEYS"""
DECODER = '''

def number(data: bytes) -> float:
    """A number in decimal."""
    return float(data)
'''
RECIPE = """
extends: {digits}
name: weighted
task: weighted_pairs
data:
  train: [{{shards: {shards}}}]
  batch_size: 8
train: {{duration: 4 steps, log_every: 1 steps}}
checkpoint: {{every: 100 steps}}
evaluate: {{every: 100 steps, retrieval: [], zero_shot: []}}
optim: {{warmup: 1 steps}}
cluster: {{tasks_per_node: 1}}
"""


def paths_of(text: str) -> set[str]:
    return set(re.findall(r"`((?:clipcluster|jobs|tools|recipes|docs|tests)/[\w/.]+)`", text))


def test_every_file_that_the_page_names_is_there():
    made_by_the_reader = {"clipcluster/data/loading/decoders.py"}
    missing = [
        path
        for path in paths_of(PAGE) - made_by_the_reader
        if "NAME" not in path and not (ROOT / path).exists()
    ]
    assert missing == []
    ways = PAGE[PAGE.index("## From start to end") : PAGE.index("## Where a new one goes")]
    there = {path.name for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert set(re.findall(r"\b(\w+\.py)\b", ways)) <= there


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for room in ROOMS
        for path in (root / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the packages, in which the steps of the page are followed."""
    copy = tmp_path / "house"
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def clipcluster(house: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=house.parent,
        env={**os.environ, "PYTHONPATH": str(house)},
        capture_output=True,
        text=True,
    )


def test_a_task_is_added_by_the_steps_of_the_page(house: Path, tmp_path: Path):
    steps = PAGE[PAGE.index("**A new task**") : PAGE.index("**A new loss**")]
    named = {path.replace("NAME", "weighted_pairs") for path in paths_of(steps)}
    before = contents(house)

    (house / "clipcluster/model/weighted_pairs.py").write_text(TASK)
    table = house / "clipcluster/recipe/tasks.py"
    table.write_text(table.read_text().replace("}\n\nKEYS", ENTRY, 1))
    with open(house / "clipcluster/data/loading/decoders.py", "a") as decoders:
        decoders.write(DECODER)
    made = clipcluster(house, "clipcluster.recipe.reference")
    assert made.returncode == 0, made.stderr

    with ShardWriter(tmp_path / "shards", samples_per_shard=20) as writer:
        split = DIGITS.open([], NoOptions()).splits[0]
        for number in range(32):
            record = split.read(number)
            text = record.captions[0].encode()
            weight = str(1 + number % 2).encode()
            writer.add_members(record.key, {"png": record.image, "txt": text, "weight.txt": weight})
    recipe = house / "recipes/weighted_pairs.yaml"
    recipe.write_text(RECIPE.format(digits=house / "recipes/digits.yaml", shards=tmp_path / "shards"))

    done = clipcluster(house, "jobs.cli", "submit", recipe, "--executor", "local", "--follow", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").glob("weighted-*")
    lines = [json.loads(line) for line in (run / "attempts/1/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert sum(line["mean_weight"] for line in lines) / 4 == 1.5  # an epoch: every sample once
    assert lines[-1]["loss"] < lines[0]["loss"]

    after = contents(house)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed <= named, changed - named
    assert json.loads(after["docs/recipe.schema.json"]) != json.loads(before["docs/recipe.schema.json"])
