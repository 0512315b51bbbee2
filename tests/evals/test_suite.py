"""The evaluations of a recipe on real shards, by real ranks."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suite_of_ranks import recipe

from clipcluster.data.shards.open import open_folder
from clipcluster.data.tokenizer import load_tokenizer
from clipcluster.errors import UserError
from clipcluster.evals.features import EXAMPLES
from clipcluster.evals.suite import build_suite
from clipcluster.recipe.tasks import METRICS
from clipcluster.runtime.world import World
from tests.shard_writer import ShardWriter
from tools.convert.convert import convert

SIZES = (1, 2, 4)
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


@pytest.mark.long
def test_fewer_images_than_ranks(digits: Path, tmp_path: Path) -> None:
    few, source = tmp_path / "few", open_folder(digits)
    other = int(np.argmax(source.classes != source.classes[0]))  # a probe needs two classes
    with ShardWriter(few) as writer:
        for position in (0, other):
            sample = source.read(position)
            writer.add(sample.key, sample.image, "png", sample.captions, cls=sample.cls)
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        shutil.copy(digits / name, few)
    reports = measured(tmp_path, few, (1, 3))
    alone = reports[1, 0]["measured"]
    assert alone["metrics"]["few/images"] == 2
    for rank in range(3):
        assert reports[3, rank]["measured"]["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)


def test_the_names_tell_what_was_measured(reports: Reports) -> None:
    counts = ("images", "pairs", "distinct_captions", "zero_shot_images", "probe_images")
    kinds = (METRICS[kind] for kind in ("retrieval", "zero_shot", "probe"))
    expected = {f"test/{name}" for name in (*itertools.chain(*kinds), *counts)}
    results = reports[1, 0]["measured"]["metrics"]
    assert set(results) == expected
    assert results["test/images"] == results["test/zero_shot_images"] == 360
    assert results["test/pairs"] > results["test/distinct_captions"]


def test_every_number_of_ranks_measures_the_same(reports: Reports) -> None:
    alone = reports[1, 0]["measured"]["metrics"]
    assert 0.5 < alone["test/linear_top1"] <= 1
    for report in reports.values():
        # The loss, and a probe's fit, have the last bits of the features.
        loose = {"test/loss": 1e-6, "test/knn_top1": 0.02, "test/linear_top1": 0.02}
        for name, value in report["measured"]["metrics"].items():
            assert value == pytest.approx(alone[name], rel=loose.get(name, 0), abs=0), name


def test_every_number_of_ranks_gives_the_same_features_the_same_figures(reports: Reports) -> None:
    """To the last digit, the loss included."""
    alone = reports[1, 0]["of_features"]
    assert 0 < alone["paired_i2t_r1"] < alone["i2t_r1"] < 1
    assert all(report["of_features"] == alone for report in reports.values())


def test_every_number_of_ranks_shows_the_same_examples(reports: Reports, digits: Path) -> None:
    alone = reports[1, 0]["measured"]["details"]["test"]
    assert set(alone) == {"retrieval", "zero_shot"}
    source = open_folder(digits)
    keys = {source.read(position).key for position in range(source.n_samples)}
    shown = {own["key"] for one in alone["retrieval"]["t2i"] for own in (one["query"], *one["top"])}
    assert shown < keys
    for report in reports.values():
        found = report["measured"]["details"]["test"]
        for way in ("t2i", "i2t"):
            assert [own["query"] for own in found["retrieval"][way]] == [
                own["query"] for own in alone["retrieval"][way]
            ]
        assert found["zero_shot"]["classes"] == alone["zero_shot"]["classes"]
        assert found["zero_shot"]["confused"] == alone["zero_shot"]["confused"]
        assert len(found["zero_shot"]["confident_errors"]) == EXAMPLES


def test_every_number_of_ranks_classifies_the_same(reports: Reports) -> None:
    alone = reports[1, 0]["classified"]["metrics"]
    assert alone["test/classified_images"] == 360
    assert 0 < alone["test/top1"] < alone["test/top5"] < 1
    for report in reports.values():
        assert report["classified"]["metrics"] == pytest.approx(alone, rel=1e-6)
        assert set(report["classified"]["details"]["test"]) == {"classification"}


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


def test_sets_with_class_names_and_templates_of_their_own(digits: Path, tmp_path: Path) -> None:
    names, lines = tmp_path / "numerals.txt", tmp_path / "lines.txt"
    names.write_text("零\n一\n二\n三\n四\n五\n六\n七\n八\n九\n", encoding="utf-8")
    lines.write_text("数字{c}\n{c}\n", encoding="utf-8")
    own = {"shards": str(digits), "classnames": str(names), "templates": str(lines), "name": "numerals"}
    settings = recipe(digits, batch_size=32, zero_shot=[str(digits), own])
    world = World(0, 1, 0, torch.device("cpu"))
    tokenizer = load_tokenizer(settings.data.text)
    suite = build_suite(settings, world=world, tokenizer=tokenizer)
    found = {images.name: images for kind, images in suite.evaluations if kind == "zero_shot"}
    assert found["numerals"].classnames[3] == "三"
    assert found["numerals"].templates == ["数字{c}", "{c}"]
    assert found["test"].classnames == open_folder(digits).classnames
    twice = recipe(digits, batch_size=32, zero_shot=[str(digits), {**own, "name": None}])
    with pytest.raises(UserError, match=r"evaluate\.zero_shot: two sets are called test.*give one a name"):
        build_suite(twice, world=world, tokenizer=tokenizer)
