"""The optimizer of a recipe: which parameters have which learning rate and weight decay."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from clipcluster.build.optimizer import build_optimizer, build_schedule, hyperparameters
from clipcluster.errors import UserError
from clipcluster.recipe.files import RECIPES
from clipcluster.recipe.load import load
from clipcluster.recipe.plan import plan
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.train.optimizer import Hyperparameters


class Model(nn.Module):
    """The names of a dual encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.ModuleDict({"linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        self.text = nn.ModuleDict({"words": nn.Embedding(9, 4)})
        self.image_projection = nn.Linear(4, 4, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1))
        self.head = nn.Linear(4, 3)


def recipe(**optim: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "data": {"train": [{"shards": "s"}], "batch_size": 10},
            "model": {"image": {"timm": "x"}, "text": {"arch": "gpt2"}},
            "optim": {"lr": 1e-3, "weight_decay": 0.2, **optim},
            "train": {"duration": "20 steps"},
        }
    )


def test_parts_have_their_own_rates_and_decays() -> None:
    own = {"image": {"lr": 1e-4, "weight_decay": 0.05}, "logit_scale": {"lr": {"base": 1e-2, "per": 100}}}
    found = hyperparameters(recipe(text={"weight_decay": 0.0}, no_decay=["head.*"], **own), Model())
    image, scale = pytest.approx(0.1), pytest.approx(1.0)
    assert found == {
        "image.linear.weight": Hyperparameters(image, 0.05),  # type: ignore[arg-type]
        "image.linear.bias": Hyperparameters(image),  # type: ignore[arg-type]
        "image.norm.weight": Hyperparameters(image),  # type: ignore[arg-type]
        "image.norm.bias": Hyperparameters(image),  # type: ignore[arg-type]
        "text.words.weight": Hyperparameters(1.0, 0.0),
        "image_projection.weight": Hyperparameters(image, 0.05),  # type: ignore[arg-type]
        "logit_scale": Hyperparameters(scale),  # type: ignore[arg-type]
        "logit_bias": Hyperparameters(scale),  # type: ignore[arg-type]
        "head.weight": Hyperparameters(1.0),
        "head.bias": Hyperparameters(1.0),
    }


def test_a_tower_s_layers_decay_and_its_projection_does_not() -> None:
    model = Model()
    model.image = timm.create_model("convnext_atto", depths=(1, 1, 4, 1), dims=(4, 4, 4, 4), num_classes=0)
    for ids, last in (("blocks", 8), ("groups", 13)):
        own = {"lr": 5e-4, "layer_decay": 0.5, "layer_ids": ids}
        found = hyperparameters(recipe(image=own), model)
        factors = {name: each.lr_factor for name, each in found.items()}
        fourth = 1 + 2 + 3 if ids == "blocks" else 4
        assert factors["image.stages.2.blocks.3.mlp.fc1.weight"] == pytest.approx(
            0.5 * 0.5 ** (last - fourth)
        )
        assert factors["image.head.norm.weight"] == factors["image_projection.weight"] == pytest.approx(0.5)
        assert factors["text.words.weight"] == factors["head.weight"] == 1.0
        assert found["image.stages.2.blocks.3.mlp.fc1.weight"].weight_decay == 0.2
    with pytest.raises(UserError, match=r"optim\.text\.layer_decay: the tower has no layers"):
        hyperparameters(recipe(text={"layer_decay": 0.5}), model)


def test_the_recipe_for_384_pixels_has_the_published_ids_of_convnext_s_layers() -> None:
    folders = {"DATA": "/data", "WEIGHTS": "/weights"}
    fine_tuning = load(RECIPES / "imagenet1k-convnext-base-384.yaml", environ=folders).recipe
    model = nn.Module()
    with torch.device("meta"):
        model.image = timm.create_model("convnext_base", num_classes=0)
    found = hyperparameters(fine_tuning, model)
    assert found["image.stem.0.weight"].lr_factor == pytest.approx(0.7**13)
    assert found["image.stages.2.blocks.26.mlp.fc1.weight"].lr_factor == pytest.approx(0.7**2)
    assert found["image.head.norm.weight"].lr_factor == 1.0


def test_nothing_changes_by_default() -> None:
    found = hyperparameters(recipe(), Model())
    assert set(found.values()) == {Hyperparameters(1.0, 0.2), Hyperparameters(1.0)}
    decaying = {name for name, own in found.items() if own.weight_decay is not None}
    assert decaying == {"image.linear.weight", "text.words.weight", "image_projection.weight", "head.weight"}


def test_the_weight_decay_and_the_rate_of_every_step() -> None:
    model, given = Model(), recipe(weight_decay_end=0.1, schedule="wsd", cooldown="50%", min_lr=1e-4)
    given = given.model_copy(update={"optim": given.optim.model_copy(update={"text": given.optim.image})})
    optimizer, schedule = build_optimizer(given, model, 20), build_schedule(given, plan(given, 100, 1))
    rates, decays = [], []
    for step in range(20):
        optimizer.step(schedule(step), step, divisor=torch.tensor(1.0), found_inf=torch.tensor(0.0))
        groups = optimizer._optimizer.param_groups
        rates.append({group["lr"] for group in groups})
        decays.append(sorted({group["weight_decay"] for group in groups}))
    assert rates[:11] == [{1e-3}] * 11
    assert [next(iter(rate)) for rate in rates[11:]] == pytest.approx([1e-3 - 9e-5 * k for k in range(1, 10)])
    assert [pair[0] for pair in decays] == [0.0] * 20  # what never decays
    assert decays[0][1] == 0.2
    assert decays[10][1] == pytest.approx(0.15)


def test_a_tower_without_weight_decay_gets_none_by_the_end() -> None:
    optimizer = build_optimizer(recipe(weight_decay_end=0.1, text={"weight_decay": 0}), Model(), 20)
    optimizer.step(1e-3, 10, divisor=torch.tensor(1.0), found_inf=torch.tensor(0.0))
    decays = {group["weight_decay"] for group in optimizer._optimizer.param_groups}
    assert sorted(decays) == [0.0, pytest.approx(0.15)]


def test_muon_leaves_embeddings_and_its_fallback_list_to_adamw() -> None:
    given = recipe(name="muon", args={"fallback_list": ["head.*"], "momentum": 0.9})
    found = hyperparameters(given, Model())
    assert {name for name, own in found.items() if own.fallback} == {
        "text.words.weight",
        "head.weight",
        "head.bias",
    }
    assert len(build_optimizer(given, Model(), 20).describe()) == 4


@pytest.mark.parametrize(
    ("optim", "said"),
    [
        ({"no_decay": ["*.pos_embed"]}, r"optim\.no_decay: '\*\.pos_embed' fits no parameter"),
        (
            {"name": "muon", "args": {"fallback_list": ["hed.*"]}},
            r"fallback_list: 'hed\.\*' fits no parameter",
        ),
        ({"name": "muon", "args": {"fallback_list": "head"}}, "should be a list of patterns"),
        ({"name": "adan", "args": {"betas": [0.9, 0.99]}}, "timm cannot make adan"),
        ({"name": "muon", "args": {"adjust_lr_fn": "nothing"}}, "timm cannot make muon"),
        ({"name": "lionn"}, r"timm has no optimizer 'lionn'; did you mean lion"),
        ({"name": "sgd", "args": {"betas": [0.9, 0.9]}}, "timm cannot make sgd"),
        ({"name": "lamb", "args": {"fallback_list": ["head.*"]}}, "timm cannot make lamb.*'fallback_list'"),
    ],
)
def test_what_is_refused(optim: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_optimizer(recipe(**optim), Model(), 20)


def test_a_part_that_the_model_does_not_have_is_refused() -> None:
    model = Model()
    del model.text
    for own in ({"lr": 1e-3}, {"layer_decay": 0.5}, {"weight_decay": 0.0}):
        with pytest.raises(UserError, match=r"optim\.text has no effect: .* no such part"):
            hyperparameters(recipe(text=own), model)
