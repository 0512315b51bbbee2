"""What is said first of an evaluation, and by which words."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from clipcluster.evals.headline import (
    CLASSIFICATION,
    COUNTS,
    GROUPED,
    LOSS,
    PAIRED,
    PROBE,
    ZERO_SHOT,
    headline_text,
    ordered,
    set_names,
)
from clipcluster.recipe.tasks import METRICS

RESULTS: dict[str, float | None] = {
    "val/i2t_r1": 0.25,
    "val/i2t_mean_rank": 3.5,
    "val/t2i_r1": 0.2,
    "val/paired_i2t_r1": 0.05,
    "val/images": 1000.0,
    "val/distinct_captions": 5000.0,
    "test/zero_shot_top1": None,
    "test/zero_shot_top5": 0.9,
    "test/zero_shot_images": 360.0,
}


def test_the_headline_comes_first_and_the_paired_figures_behind() -> None:
    kinds = ordered(RESULTS)
    assert list(kinds) == [ZERO_SHOT, GROUPED, PAIRED, COUNTS]
    shown = [(result.set, result.metric, result.text) for own in kinds.values() for result in own]
    assert shown == [
        ("test", "top1", "not finite"),
        ("test", "top5", "90.00 %"),
        ("val", "i2t_r1", "25.00 %"),
        ("val", "i2t_mean_rank", "3.5"),
        ("val", "t2i_r1", "20.00 %"),
        ("val", "i2t_r1", "5.00 %"),
        ("val", "images", "1,000"),
        ("val", "distinct_captions", "5,000"),
        ("test", "zero_shot_images", "360"),
    ]
    assert "five captions" in PAIRED.explanation


def test_a_line_has_the_headline_alone() -> None:
    expected = "test/zero_shot_top1 not finite, val/i2t_r1 25.00 %, val/t2i_r1 20.00 % (9 results in all)"
    assert headline_text(RESULTS) == expected
    assert headline_text({"toy/size": 3.0}) == "toy/size 3"
    assert headline_text({"toy/size": float("nan")}) == "toy/size not finite"
    assert headline_text({}) == ""


def test_every_metric_of_the_tasks_has_a_kind() -> None:
    names = {f"set/{metric}": 0.5 for metrics in METRICS.values() for metric in metrics}
    assert list(ordered(names)) == [CLASSIFICATION, ZERO_SHOT, PROBE, GROUPED, LOSS, PAIRED]


def test_accuracies_are_percentages_and_a_loss_is_none() -> None:
    results: dict[str, float | None] = {"val/top1": 0.5, "val/loss": 0.25, "val/raw_top1": 0.25}
    found = [(own.metric, own.text) for kind in ordered(results).values() for own in kind]
    assert found == [("top1", "50.00 %"), ("raw_top1", "25.00 %"), ("loss", "0.2500")]
    assert headline_text(results) == "val/top1 50.00 %, val/raw_top1 25.00 % (3 results in all)"


def test_it_needs_no_torch() -> None:
    code = "import sys, clipcluster.evals.headline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_sets_are_named_by_their_last_component_unless_that_is_ambiguous() -> None:
    def names(*folders: str) -> list[str]:
        return list(set_names(folders).values())

    assert names("/data/coco/val", "/data/digits/test", "/data/coco/val") == ["val", "test"]
    assert names("/data/coco/val", "/data/flickr/val", "x") == ["coco-val", "flickr-val", "x"]
    of_keys = ("s3://a/val", "https://b/c?of=1", "https://b/c?of=2")
    assert names(*of_keys) == ["val", "https:-b-c-2", "https:-b-c-3"]


@given(
    st.lists(
        st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts)),
        max_size=6,
        unique=True,
    )
)
def test_names_of_sets_differ(folders: list[str]) -> None:
    assert len(set(set_names(folders).values())) == len(folders)
