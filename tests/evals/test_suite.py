"""The evaluations of a recipe on real shards, by real ranks."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from suite_of_ranks import recipe

from clipcluster.data.shards.open import open_folder
from clipcluster.data.tokenizer import load_tokenizer
from clipcluster.evals.suite import build_suite
from clipcluster.recipe.tasks import METRICS
from clipcluster.runtime.world import World
from tests.shard_writer import ShardWriter
from tools.convert.convert import convert

SIZES = (1, 2, 3)
WORKER = Path(__file__).with_name("suite_of_ranks.py")


Reports = dict[tuple[int, int], dict]


def measured(out: Path, shards: Path, sizes: tuple[int, ...]) -> Reports:
    """By number of processes and rank: what a run of the suite on a folder of shards reported."""
    command = [sys.executable, str(WORKER), str(out), str(shards), *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return {
        (size, rank): json.loads((out / f"{size}-{rank}.json").read_text())
        for size in sizes
        for rank in range(size)
    }


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 360 held-out digits."""
    return convert("digits", tmp_path_factory.mktemp("data") / "digits").out / "test"


@pytest.fixture(scope="module")
def reports(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return measured(tmp_path_factory.mktemp("suite"), digits, SIZES)


def test_fewer_images_than_ranks(digits: Path, tmp_path: Path) -> None:
    few, source = tmp_path / "few", open_folder(digits)
    with ShardWriter(few) as writer:
        for position in range(2):
            sample = source.read(position)
            writer.add(sample.key, sample.image, "png", sample.captions, cls=sample.cls)
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        shutil.copy(digits / name, few)
    reports = measured(tmp_path, few, (1, 3))
    assert reports[1, 0]["results"]["few/images"] == 2
    assert [reports[3, rank]["results"] for rank in range(3)] == [reports[1, 0]["results"]] * 3


def test_the_names_tell_what_was_measured(reports: Reports) -> None:
    counts = ("images", "pairs", "distinct_captions", "zero_shot_images")
    expected = {f"test/{name}" for name in (*METRICS["retrieval"], *METRICS["zero_shot"], *counts)}
    results = reports[1, 0]["results"]
    assert set(results) == expected
    assert results["test/images"] == results["test/zero_shot_images"] == 360
    assert results["test/pairs"] > results["test/distinct_captions"]


def test_every_number_of_ranks_measures_the_same(reports: Reports) -> None:
    alone = reports[1, 0]["results"]
    assert all(report["results"] == alone for report in reports.values())


def test_every_number_of_ranks_classifies_the_same(reports: Reports) -> None:
    alone = reports[1, 0]["classified"]
    assert alone["test/classified_images"] == 360
    assert 0 < alone["test/top1"] < alone["test/top5"] < 1
    for report in reports.values():
        assert report["classified"] == pytest.approx(alone, rel=1e-6)


def test_ranks_ask_for_a_stop_equally_often_and_stop_together(reports: Reports) -> None:
    for size in SIZES:
        ranks = [reports[size, rank] for rank in range(size)]
        assert len({report["calls"] for report in ranks}) == 1
        assert {report["stopped_at"] for report in ranks} == {7}
        assert ranks[0]["calls"] > 7


def test_the_model_is_left_training(reports: Reports) -> None:
    assert all(report["training"] for report in reports.values())


def test_what_is_shown_of_a_set_holds_no_key(
    digits: Path, tmp_path: Path, web_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPCLUSTER_CACHE", str(tmp_path))
    address = f"{web_server(digits).address}?token=hunter2"
    settings = recipe(address, batch_size=32)
    world = World(0, 1, 0, torch.device("cpu"))
    suite = build_suite(settings, world=world, tokenizer=load_tokenizer(settings.data.text))
    shown = {images.folder for _, images in suite.evaluations}
    assert shown == {address.partition("?")[0]}
