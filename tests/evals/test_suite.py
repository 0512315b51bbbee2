"""The evaluations of a recipe on real shards, by real ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.evals.suite import set_names
from tools.convert import convert

SIZES = (1, 2, 3)
WORKER = Path(__file__).with_name("suite_of_ranks.py")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict]:
    """By number of processes and rank: what a run of the suite on the 360 held-out digits reported."""
    out = tmp_path_factory.mktemp("suite")
    convert("digits", out / "digits")
    command = [sys.executable, str(WORKER), str(out), str(out / "digits" / "test"), *map(str, SIZES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return {
        (size, rank): json.loads((out / f"{size}-{rank}.json").read_text())
        for size in SIZES
        for rank in range(size)
    }


def test_the_names_tell_what_was_measured(reports: dict[tuple[int, int], dict]) -> None:
    kinds = ("r1", "r5", "r10", "mean_rank", "median_rank")
    sides = ("i2t", "t2i", "paired_i2t", "paired_t2i")
    counts = ("images", "pairs", "distinct_captions", "zero_shot_images", "zero_shot_top1", "zero_shot_top5")
    expected = {f"test/{side}_{kind}" for side in sides for kind in kinds} | {
        f"test/{name}" for name in counts
    }
    results = reports[1, 0]["results"]
    assert set(results) == expected
    assert results["test/images"] == results["test/zero_shot_images"] == 360
    assert results["test/pairs"] > results["test/distinct_captions"]


def test_every_number_of_ranks_measures_the_same(reports: dict[tuple[int, int], dict]) -> None:
    alone = reports[1, 0]["results"]
    assert all(report["results"] == alone for report in reports.values())


def test_ranks_ask_for_a_stop_equally_often_and_stop_together(reports: dict[tuple[int, int], dict]) -> None:
    for size in SIZES:
        ranks = [reports[size, rank] for rank in range(size)]
        assert len({report["calls"] for report in ranks}) == 1
        assert {report["stopped_at"] for report in ranks} == {7}
        assert ranks[0]["calls"] > 7


def test_the_model_is_left_training(reports: dict[tuple[int, int], dict]) -> None:
    assert all(report["training"] for report in reports.values())


def test_sets_are_named_by_their_last_component_unless_that_is_ambiguous() -> None:
    assert set_names(["/data/coco/val", "/data/digits/test"]) == ["val", "test"]
    assert set_names(["/data/coco/val", "/data/flickr/val", "x"]) == ["coco-val", "flickr-val", "x"]


@given(
    st.lists(
        st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts)),
        max_size=6,
        unique=True,
    )
)
def test_names_of_sets_differ(folders: list[str]) -> None:
    assert len(set(set_names(folders))) == len(folders)
