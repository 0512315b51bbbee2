"""Settings that trained badly elsewhere: each is found, shown with its arithmetic, and can be allowed.

Each recipe is that of the run that failed, on as many samples as it had; its repair finds nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipcluster.check.experience import findings
from clipcluster.check.plain import Findings
from clipcluster.errors import UserError
from clipcluster.recipe.files import RECIPES
from clipcluster.recipe.load import load
from clipcluster.recipe.plan import plan
from clipcluster.recipe.sections.recipe import Recipe

CC3M, COCO = 3_000_000, 591_753


def recipe(**changes: Any) -> Recipe:
    """A ResNet-50 with CLIP's text transformer on three million pairs, repaired: nothing is found in it."""
    keys: dict[str, Any] = {
        "name": "rn50",
        "data": {"train": [{"shards": "cc3m"}], "batch_size": 1024, "image": {"crop_scale": [0.4, 1.0]}},
        "model": {"image": {"timm": "resnet50_clip"}, "text": {"clip": {}}},
        "optim": {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.99], "warmup": "2000 steps"},
        "train": {"duration": "32 epochs", "precision": "bf16"},
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = keys
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return Recipe.model_validate(keys)


def found(samples: int, **changes: Any) -> dict[str, str]:
    chosen = recipe(**changes)
    return dict(findings(chosen, plan(chosen, samples, 8), samples))


def test_the_repaired_run_has_no_finding() -> None:
    assert found(CC3M) == {}


COCO_RUN = {
    "model__image__weights": "a",
    "model__text__weights": "b",
    "optim__lr": 7e-4,
    "data__batch_size": 384,
}


@pytest.mark.parametrize(
    ("samples", "changes", "name", "said"),
    [
        (CC3M, {"optim__warmup": "10000 steps"}, "long-warmup", "10000 steps is 3.4 epochs of 2,929 steps"),
        (
            CC3M,
            {"optim__warmup": "8 epochs"},
            "long-warmup",
            "(23,432 steps) is 25.0% of the run's 93,728 steps",
        ),
        (
            CC3M,
            {"optim__betas": [0.9, 0.999]},
            "slow-beta2",
            "beta2 0.999 averages squared gradients over 1,000",
        ),
        (
            CC3M,
            {"data__image__crop_scale": [0.9, 1.0]},
            "weak-augmentation",
            "begins at 0.9: an image tower from scratch sees 3,000,000 samples 32 times",
        ),
        (
            COCO,
            {**COCO_RUN, "model__text__weights": None},
            "text-from-scratch",
            "the training data have 591,753 captioned samples, less than 1,000,000",
        ),
        (
            CC3M,
            {"data__batch_size": 65536, "train__duration": "20 epochs", "optim__warmup": "100 steps"},
            "few-steps",
            "58,982,400 samples are only 900 steps, and an image tower from scratch needs some thousands; "
            "batches of 14,745 make 4,000 steps",
        ),
        (
            CC3M,
            {"optim__lr": 0.01},
            "learning-rate",
            "0.0005 x sqrt(1,024 / 512) = 0.00071; this is 14 times as much",
        ),
        (CC3M, {"optim__lr": 5e-5}, "learning-rate", "this is 14 times less"),
        (CC3M, {"optim__lr": 0}, "learning-rate", "optim.lr is 0: no weight changes"),
        (CC3M, {"optim__lr": {"base": 2.5e-3, "per": 256}}, "learning-rate", "this is 14 times as much"),
    ],
)
def test_what_failed_is_found(samples: int, changes: dict[str, Any], name: str, said: str) -> None:
    result = found(samples, **changes)
    assert list(result) == [name]
    assert said in result[name]
    for allowed in (False, True):
        chosen = recipe(**changes, checks__allow=[name] if allowed else [])
        seen = Findings()
        seen.advise(chosen.checks, name, result[name])  # type: ignore[arg-type]
        assert seen.warnings == ([] if allowed else [f"{result[name]} (if intended: checks.allow: [{name}])"])
        assert seen.summary == ([f"allowed ({name}): {result[name]}"] if allowed else [])


def test_a_large_batch_that_ends_in_the_warm_up_is_refused() -> None:
    """2,200 steps suit batches of 384; those of 16,384 leave 936 steps in the same 26 epochs."""
    assert found(COCO, **COCO_RUN, optim__warmup="2200 steps", train__duration="26 epochs") == {}
    large = recipe(
        **{**COCO_RUN, "data__batch_size": 16384}, optim__warmup="2200 steps", train__duration="26 epochs"
    )
    with pytest.raises(UserError, match=r"2200 steps takes the whole run of 936 steps .* still warming up"):
        plan(large, COCO, 8)


@pytest.mark.parametrize("key", ["local_loss", "gather_with_grad"])
def test_gradients_over_ranks_cannot_be_set_wrongly(key: str) -> None:
    """Those of one process with the whole batch, always: tests/model/test_gradients.py compares them."""
    with pytest.raises(ValueError, match=key):
        recipe(**{f"loss__{key}": True})


def test_starting_weights_and_other_tasks_need_less() -> None:
    from_weights = {"model__weights": "clip", "data__image__crop_scale": [0.9, 1.0], "optim__lr": 3e-6}
    assert found(50_000, **from_weights, train__duration="3 epochs", optim__warmup="20 steps") == {}
    supervised = {"task": "classify", "model": {"image": {"timm": "resnet50"}}, "optim__betas": [0.9, 0.999]}
    assert found(1_281_167, **supervised, optim__warmup="20 epochs", train__duration="300 epochs") == {}


SAMPLES = {
    "cc3m": CC3M,
    "chinese-clip-muge": 250_000,
    "chinese-clip-small": 20_000,
    "coco": COCO,
    "datacomp": 12_800_000,
    "digits": 1437,
    "imagenet1k": 1_281_167,
    "imagenet22k": 14_197_122,
    "siglip": 1_000_000_000,
}
"""What the recipes that come along are for, by the beginning of their names."""


@pytest.mark.parametrize(
    "file", sorted(set(RECIPES.glob("*.yaml")) - {RECIPES / "base.yaml"}), ids=lambda f: f.stem
)
def test_the_recipes_that_come_along_have_no_finding(file: Path) -> None:
    places = {name: f"/{name.lower()}" for name in ("DATA", "WEIGHTS", "ASSETS")}
    chosen = load(file, (), {"XDG_CONFIG_HOME": "/nowhere", **places}).recipe
    samples = next(count for name, count in SAMPLES.items() if file.name.startswith(name))
    ranks = chosen.cluster.nodes.most * chosen.cluster.ranks_per_node
    names = {name for name, _ in findings(chosen, plan(chosen, samples, ranks), samples)}
    assert names == set(chosen.checks.allow)
