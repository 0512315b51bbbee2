"""Planted errors: a right recipe with one change each, and what the check says of it and advises."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from clipcluster.check import plain
from clipcluster.check.deep import examine
from clipcluster.check.plain import Findings
from clipcluster.errors import UserError
from clipcluster.runs.folder import Run
from jobs.check import cluster, memory, storage
from tests.jobs.check.clusters import known


class Planted(NamedTuple):
    """One error: `change` are overrides of the recipe, or a function of the working directory."""

    change: str | tuple[str, ...] | Callable[[Path], None]
    words: str
    remedy: str


def without_index(folder: Path) -> None:
    (folder / "data/train/.clipcluster-index.json").unlink(missing_ok=True)
    for index in (folder / "data/train").iterdir():
        if index.suffix != ".tar":
            index.unlink()


def without_names(folder: Path) -> None:
    (folder / "data/classnames.txt").unlink()


def without_train(folder: Path) -> None:
    shutil.move(folder / "data/train", folder / "data/training")


# What the plain check finds, in the recipe and the files that it names.
RECIPE = [
    Planted("optim.lrr=1", "unknown key", "did you mean optim.lr?"),
    Planted("train.duration=10", "the length of a run is 'N steps'", "did you mean 10 steps"),
    Planted("train.precision=float16", "should be fp32 or tf32 or bf16 or fp16", "did you mean fp16?"),
    Planted("data.train.0.shards='${NOWHERE}/train'", "NOWHERE", "set"),
    Planted("data.batch_size=5", "does not divide by 2 ranks", "set it to 4 or 6"),
    Planted("data.batch_size=10", "hold 9 samples, less than one batch of 10", "batch_size"),
    Planted("optim.warmup=10 epochs", "would end while still warming up", "set it to at most 4 steps"),
    Planted("model.image.timm=test_convnex", "has no model 'test_convnex'", "did you mean test_convnext?"),
    Planted("model.text={arch: gpt3}", "has no model type 'gpt3'", "text towers are gpt2, bert"),
    Planted("optim.name=lambb", "has no optimizer 'lambb'", "did you mean lamb?"),
    Planted("model.image.weights=data/trian", "data/trian does not exist", "did you mean"),
    Planted("checkpoint.keep.last=1", "should be at least 2", "the newest may be damaged"),
    Planted(
        "checkpoint.keep.best={metric: test/t2i_r2}",
        "nothing measures 'test/t2i_r2'",
        "did you mean test/t2i_r5?",
    ),
    Planted("train.batch_norm_group=3", "does not divide 2 samples a rank", "set it to 2"),
    Planted(
        "freeze=[{tower: text, trainable: last 1}]",
        "they would stay random",
        "model.text.weights",
    ),
    Planted("data.train.0.repeat_classes={ood: 2}", "is called 'ood'", "did you mean 'odd'?"),
]
# … in what lies where the recipe says.
FILES = [
    Planted(without_train, "no such folder", "give a folder that holds .tar shards"),
    Planted(without_index, "index", "clipcluster shards index"),
    Planted(without_names, "zero-shot needs classnames.txt", "classnames: FILE"),
]
# What the cluster of tests/jobs/check/clusters.py has not, or does not allow.
CLUSTER = [
    Planted("cluster.partition=lwo", "there is no partition 'lwo'", "did you mean low?"),
    Planted("cluster.partition=old", "partition old is DRAIN: it accepts no jobs", "use one of low, high"),
    Planted(
        "cluster.time=3 d", "3 d requested, and partition low allows (MaxTime) 2 d", "set it to at most that"
    ),
    Planted("cluster.nodes=5", "5 requested, and partition low has 4 nodes", "set it to at most 4"),
    Planted("cluster.mem=100 GB", "nodes of partition low have 64000 MB", "set it to at most that"),
    Planted("cluster.cpus_per_task=9", "2 ranks x 9 CPUs are 18 on a node", "set it to at most 8"),
    Planted(
        "cluster.gpus_per_node=8", "8 requested, and nodes of partition low have 4", "set it to at most 4"
    ),
    Planted("cluster.constraint=a10", "no node of partition low has 'a10'", "did you mean a100?"),
    Planted("cluster.account=visoin", "'visoin' is not one of your accounts, ", "did you mean vision?"),
    Planted("cluster.qos=lonng", "'lonng' is not one that you may use, ", "did you mean long?"),
    Planted(
        ("cluster.gpus_per_node=2", "cluster.gpu_type=h100"),
        "2 of type h100 requested, and nodes of partition low have none",
        "set cluster.gpu_type to what they have: a100, or leave it out",
    ),
    Planted("cluster.reservation=workshp", "there is no reservation 'workshp'", "did you mean workshop?"),
    Planted(
        "cluster.container={runtime: pyxis, image: torch.sqsh}",
        "srun has no --container-image here",
        "use apptainer",
    ),
]
# The same for one of its other partitions.
HIGH = [
    Planted(
        "cluster.gpus_per_node=1", "nodes of partition high have none", "use partition low, or set it to 0"
    ),
    Planted("cluster.nodes=2", "2 requested, and partition high allows a job 1", "set it to at most that"),
    Planted("cluster.mem=5 GB", "5 GB requested, and partition high allows 4000 MB", "set it to that"),
    Planted("cluster.account=common", "partition high does not take 'common'", "it takes vision, speech"),
    Planted("cluster.qos=long", "partition high does not take 'long'", "it takes normal"),
]
# What needs torch.
DEEP = [
    Planted(
        "freeze=[{tower: image, trainable: last 99, at: 1 epochs}]", "the image tower has", "layers: stem"
    ),
    Planted("model.image.args={global_pool: ''}", "and not one vector of", "model.image"),
    Planted("optim.no_decay=[nothing]", "fits no parameter", "optim.no_decay"),
    Planted(
        ("model.image.timm=test_vit", "model.image.args={patch_size: 24}"),
        "test_vit cannot take images of 32 pixels",
        "data.image.size",
    ),
]


def messages(planted: Planted, folder: Path, check: Callable[..., Findings], *more: str) -> str:
    """All errors that the check finds."""
    overrides = list(more)
    if callable(planted.change):
        planted.change(folder)
    else:
        overrides += [planted.change] if isinstance(planted.change, str) else planted.change
    try:
        return "\n".join(check(overrides).errors)
    except UserError as error:
        return str(error)


def of_recipe(overrides: list[str]) -> Findings:
    return plain.check("tiny.yaml", overrides)


def of_cluster(overrides: list[str]) -> Findings:
    checked = plain.check("tiny.yaml", overrides)
    return cluster.compare(checked.recipe.cluster, known(), checked.loaded.place)


def of_model(overrides: list[str]) -> Findings:
    return examine(plain.check("tiny.yaml", overrides).recipe, 2, None)


def says(text: str, planted: Planted) -> None:
    assert planted.words in text
    assert planted.remedy in text


def test_in_the_recipe(folder: Path) -> None:
    for planted in RECIPE:
        says(messages(planted, folder, of_recipe), planted)


@pytest.mark.parametrize("planted", FILES, ids=lambda planted: planted.words)
def test_in_its_files(planted: Planted, folder: Path) -> None:
    says(messages(planted, folder, of_recipe), planted)


def test_on_the_cluster(folder: Path) -> None:
    for planted in CLUSTER:
        says(messages(planted, folder, of_cluster), planted)
    for planted in HIGH:
        says(messages(planted, folder, of_cluster, "cluster.partition=high", "cluster.time=1 h"), planted)


def test_on_the_disk_and_in_memory(folder: Path) -> None:
    checked = plain.check("tiny.yaml")
    assert checked.plan is not None
    keep = checked.recipe.checkpoint.keep
    (error,) = storage.compare([Run(folder / "runs/new")], 1 << 60, keep, checked.plan).errors
    says(error, Planted("", "and one being written are", "choose a larger disk with --runs"))
    device = memory.Device(1 << 20, "cluster.mem by the ranks of a node", True)
    (error,) = memory.compare(checked.recipe, 2, {"activations": 1 << 21}, device).errors
    says(error, Planted("", "a step needs about 2.0 MB a rank", "Set train.micro_batch to 1"))


@pytest.mark.long
@pytest.mark.parametrize("planted", DEEP, ids=lambda planted: planted.words)
def test_in_the_model(planted: Planted, folder: Path) -> None:
    says(messages(planted, folder, of_model), planted)


def test_there_are_enough_of_them() -> None:
    assert len(RECIPE) + len(FILES) + len(CLUSTER) + len(HIGH) + len(DEEP) + 2 >= 25


def test_a_right_recipe_passes_without_noise(folder: Path) -> None:
    for overrides in ([], ["cluster.partition=high", "cluster.time=4 h", "cluster.account=vision"]):
        for check in (of_recipe, of_cluster):
            found = check(overrides)
            assert (found.errors, found.warnings, found.unchecked) == ([], [], [])
