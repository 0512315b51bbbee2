"""The recipe's `freeze` put to real towers: which parameters train, at which rate, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_model import WORDS, image_section, text_section, tiny_clip

from clipcluster.build.stages import build_stages, check_loaded
from clipcluster.errors import UserError
from clipcluster.model.clip import Clip
from clipcluster.recipe.stages import Freezing
from clipcluster.train.optimizer import StageRate
from clipcluster.train.stages import Stage


@pytest.fixture(scope="module")
def clip() -> Clip:
    text = text_section("gpt2", config=WORDS["gpt2"] | {"n_layer": 3})
    return tiny_clip(image=image_section("test_convnext2"), text=text)


def entry(number: int, tower: str, step: int, layers: int | None, **more: Any) -> Freezing:
    rest = {"lr_scale": 1.0, "warmup": 0, "moving_statistics": False, "norms_train": False} | more
    return Freezing(f"freeze.{number}", tower, step, layers, **rest)


def trained(clip: Clip, stage: Stage, tower: str) -> set[str]:
    names = {name for name, _ in clip.named_parameters() if stage.rate_of(name) is not None}
    return {name.removeprefix(f"{tower}.") for name in names if name.startswith(f"{tower}.")}


def test_the_last_layers_have_their_final_norm_and_projections_always_train(clip: Clip) -> None:
    frozen, last = build_stages(
        clip,
        [
            entry(0, "image", 0, 0),
            entry(1, "image", 5, 2, lr_scale=0.1, warmup=4),
            entry(2, "text", 0, 0),
            entry(3, "text", 5, 1),
        ],
    )
    outside = {"logit_scale", "image_projection.weight", "text_projection.weight"}
    assert {name for name, _ in clip.named_parameters() if frozen.rate_of(name) is not None} == outside
    assert all(stage.rate_of(name) == StageRate() for stage in (frozen, last) for name in outside)
    assert (frozen.start, last.start) == (0, 5)
    image, text = trained(clip, last, "image"), trained(clip, last, "text")
    assert all(name.startswith(("transformer.h.2.", "transformer.ln_f.")) for name in text)
    assert "transformer.ln_f.weight" in text
    assert "trunk.head.norm.weight" in image
    assert all(name.startswith(("trunk.stages.", "trunk.head.norm.")) for name in image)
    assert last.rate_of("image.trunk.head.norm.weight") == StageRate(0.1, start=5, warmup=4)
    assert last.rate_of("text.transformer.ln_f.weight") == StageRate(1.0, start=5)


def test_what_trained_before_keeps_its_rate_and_what_begins_has_the_entrys(clip: Clip) -> None:
    _, first, second, third = build_stages(
        clip,
        [
            entry(0, "text", 0, 0),
            entry(1, "text", 2, 1, lr_scale=0.5, warmup=3),
            entry(2, "text", 4, 2, lr_scale=0.1),
            entry(3, "text", 6, None, lr_scale=0.01),
        ],
    )
    old, new, table = (
        f"text.transformer.{name}" for name in ("h.2.ln_1.bias", "h.1.ln_1.bias", "wte.weight")
    )
    assert [first.rate_of(name) for name in (old, new, table)] == [StageRate(0.5, 2, 3), None, None]
    assert [second.rate_of(name) for name in (old, new, table)] == [
        StageRate(0.5, 2, 3),
        StageRate(0.1, 4),
        None,
    ]
    assert [third.rate_of(name) for name in (old, new, table)] == [
        StageRate(0.5, 2, 3),
        StageRate(0.1, 4),
        StageRate(0.01, 6),
    ]


def test_a_tower_that_trains_at_another_rate_from_the_start(clip: Clip) -> None:
    (stage,) = build_stages(clip, [entry(0, "image", 0, None, lr_scale=0.1, warmup=7)])
    assert stage.rate_of("image.trunk.stem.0.weight") == StageRate(0.1, 0, 7)
    assert stage.rate_of("text.transformer.wte.weight") == StageRate()
    assert stage.eval_modules == frozenset()


def test_norms_of_frozen_layers_may_train(clip: Clip) -> None:
    (stage,) = build_stages(clip, [entry(0, "text", 0, 0, norms_train=True, lr_scale=0.1)])
    assert trained(clip, stage, "text") == {
        f"transformer.{norm}.{kind}"
        for norm in ("ln_f", *(f"h.{block}.ln_{number}" for block in range(3) for number in (1, 2)))
        for kind in ("weight", "bias")
    }
    assert "text.transformer.h.0" in stage.eval_modules  # its dropout too


def test_more_layers_than_there_are(clip: Clip) -> None:
    with pytest.raises(UserError) as error:
        build_stages(clip, [entry(0, "text", 0, 5)])
    assert str(error.value) == (
        "freeze.0 (text: last 5 from step 0): the text tower has 4 layers: stem, transformer.h.0, "
        "transformer.h.1, transformer.h.2"
    )


def test_an_entry_that_changes_nothing_says_the_counts(clip: Clip) -> None:
    every = sum(parameter.numel() for parameter in clip.text.parameters())
    for last in (
        [entry(0, "text", 3, 4)],
        [entry(0, "text", 0, 1), entry(1, "text", 2, 4), entry(2, "text", 3, None)],
    ):
        with pytest.raises(
            UserError, match=rf"changes nothing: {every:,} of the {every:,} parameters of the text"
        ):
            build_stages(clip, last)


def test_a_model_without_the_tower() -> None:
    with pytest.raises(UserError, match="Linear has no text tower"):
        build_stages(torch.nn.Linear(2, 2), [entry(0, "text", 0, 0)])


def test_what_begins_frozen_was_loaded(clip: Clip) -> None:
    def covered(tower: str, *missing: str) -> Any:
        return SimpleNamespace(tower=tower, missing=missing)

    def check(*coverages: Any, layers: int = 0) -> None:
        clip.starting_weights = coverages
        check_loaded(clip, build_stages(clip, [entry(0, "text", 0, layers)])[0])

    with pytest.raises(UserError, match=r"text tower begins frozen without starting weights"):
        check()
    with pytest.raises(UserError, match=r"text tower begins frozen without starting weights"):
        check(covered("image"))
    check(covered("text"))
    check(covered("model"))
    with pytest.raises(
        UserError, match=r"its weights lack text\.transformer\.wpe\.weight, which would stay ran"
    ):
        check(covered("text", "wpe.weight"))
    check(covered("text", "ln_f.weight"), layers=1)  # it trains
    clip.starting_weights = ()
    check_loaded(clip, Stage())
    check_loaded(clip, build_stages(clip, [entry(0, "text", 3, 0)])[0])  # it trains first
