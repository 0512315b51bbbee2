"""Gradients of three ranks are those of one process with the whole batch; similar forms silently are not.

Every comparison is in float64. The silently wrong forms stand here so that the exact ones are known to be
measured by something that would notice.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clipcluster.runtime.world import World
from clipcluster.train.statistics import RunningStatistics

WORKER = Path(__file__).with_name("backward_of_ranks.py")
ALONE = ("whole", "cached", "classes", "dropout-12", "norm-1", "norm-cached-12", "groups", "groups-classes")
TOGETHER = (
    *("whole", "cached", "independent", "classes-cached", "dropout", "norm-cached-4", "sharded", "thawed"),
    *("scale-alone", "groups-cached-2", "groups-independent-2", "loss-outside"),
    *("beside-the-wrapper", "scale-in-every-micro-batch", "other-random-numbers", "thawed-not-wrapped"),
    "naive-statistics",
)
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By number of processes, what each rank found by case."""
    out = tmp_path_factory.mktemp("backward")
    command = [sys.executable, str(WORKER), str(out), f"1:{','.join(ALONE)}", f"3:{','.join(TOGETHER)}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return {
        size: [torch.load(out / f"{size}-{rank}.pt") for rank in range(size)]  # type: ignore[misc]
        for size in (1, 3)
    }


def distances(ranks: Any, case: str, alone: str) -> dict[str, float]:
    """How far each gradient of rank 2 is from the single process's, in norms of the latter."""
    found, expected = ranks[3][2][case]["gradients"], ranks[1][0][alone]["gradients"]
    assert found.keys() == expected.keys()
    return {
        name.removeprefix("model."): float((found[name] - value).norm() / max(value.norm(), 1e-3))
        for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("case", "alone"),
    [
        ("whole", "whole"),
        ("cached", "whole"),
        ("sharded", "whole"),
        ("independent", "classes"),
        ("classes-cached", "classes"),
        ("dropout", "dropout-12"),
        ("norm-cached-4", "norm-cached-12"),
        ("thawed", "whole"),
        ("groups-cached-2", "groups"),
        ("groups-independent-2", "groups-classes"),
    ],
)
def test_gradients_equal_those_of_one_process(ranks: Any, case: str, alone: str) -> None:
    found = distances(ranks, case, alone)
    assert "logit_scale" in found
    assert max(found.values()) < TOLERANCE, found
    for answers in ranks[3]:
        assert not answers[case]["requires_grad"]
        assert abs(float(answers[case]["loss"] - ranks[1][0][alone]["loss"])) < TOLERANCE


def test_cached_on_one_process_equals_whole(ranks: Any) -> None:
    whole, cached = ranks[1][0]["whole"]["gradients"], ranks[1][0]["cached"]["gradients"]
    assert all((whole[name] - cached[name]).norm() < TOLERANCE * whole[name].norm() for name in whole)


def test_a_loss_trains_its_own_parameter_over_frozen_towers(ranks: Any) -> None:
    expected = ranks[1][0]["whole"]["gradients"]["model.logit_scale"]
    for answers in ranks[3]:
        found = {
            name: value for name, value in answers["scale-alone"]["gradients"].items() if value is not None
        }
        assert found.keys() == {"model.logit_scale"}
        assert abs(float(found["model.logit_scale"] - expected)) < TOLERANCE
        assert answers["scale-alone"]["passes"] == 4  # one a micro-batch: features, and none for gradients


@pytest.mark.parametrize(
    ("case", "alone", "wrong"),
    [
        ("beside-the-wrapper", "whole", {"logit_scale", "first.weight", "last.weight", "words.weight"}),
        ("loss-outside", "whole", {"logit_scale", "first.weight", "last.weight", "words.weight"}),
        ("scale-in-every-micro-batch", "whole", {"logit_scale"}),
        ("thawed-not-wrapped", "whole", {"words.weight"}),
        ("other-random-numbers", "dropout-12", {"first.weight", "last.weight", "words.weight"}),
    ],
)
def test_a_form_that_fails_silently_is_noticed(ranks: Any, case: str, alone: str, wrong: set[str]) -> None:
    found = distances(ranks, case, alone)
    assert {name for name, distance in found.items() if distance > 0.1} >= wrong


def test_the_scale_counts_once_a_micro_batch_in_the_spliced_form(ranks: Any) -> None:
    spliced, whole = ranks[3][0]["scale-in-every-micro-batch"], ranks[1][0]["whole"]
    factor = spliced["gradients"]["model.logit_scale"] / whole["gradients"]["model.logit_scale"]
    assert float(factor) == pytest.approx(4)


def test_statistics_move_once_a_step_on_any_number_of_ranks(ranks: Any) -> None:
    expected = ranks[1][0]["norm-cached-12"]["buffers"]
    assert expected["norm.num_batches_tracked"] == 1
    for answers in ranks[3]:
        found = answers["norm-cached-4"]["buffers"]
        assert found["norm.num_batches_tracked"] == 1
        for name in ("norm.running_mean", "norm.running_var"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-14)
            assert torch.equal(found[name], ranks[3][0]["norm-cached-4"]["buffers"][name])
    # In groups of the same size they do not depend on micro-batches either.
    found, expected = (ranks[3][1]["groups-cached-2"]["buffers"], ranks[1][0]["groups"]["buffers"])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-14)
    expected = ranks[1][0]["norm-cached-12"]["buffers"]
    whole = ranks[1][0]["norm-1"]["buffers"]["norm.running_var"]
    assert not torch.allclose(whole, expected["norm.running_var"])  # larger groups have another variance
    naive = ranks[3][0]["naive-statistics"]["buffers"]
    assert naive["norm.num_batches_tracked"] == 8


def test_a_constant_buffer_stays_also_where_it_is_infinite() -> None:
    """As Gemma 4's image tower has them, the bounds of a clamp."""
    bound = nn.Module()
    bound.register_buffer("highest", torch.tensor([1.0, torch.inf]))
    statistics = RunningStatistics(bound, World(0, 1, 0, torch.device("cpu")))
    statistics.begin()
    statistics.take()
    statistics.take()
    statistics.commit(torch.zeros(()))
    assert torch.equal(bound.highest, torch.tensor([1.0, torch.inf]))
