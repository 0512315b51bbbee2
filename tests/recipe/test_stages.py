"""What freezes when: entries in steps, and those that say nothing or come too late are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from clipcluster.errors import UserError
from clipcluster.recipe.load import Loaded, from_run, recipe_keys, result_keys, settings_keys
from clipcluster.recipe.plan import plan

Small = Callable[..., Loaded]
WEIGHTS = ("model.image.weights=w.safetensors", "model.text.weights=w.safetensors")


def entries(*given: str) -> str:
    return f"freeze=[{', '.join('{' + entry + '}' for entry in given)}]"


def frozen(small: Small, *given: str, weights: bool = True) -> tuple[Any, ...]:
    """Of a run of 20 steps, 10 an epoch."""
    return plan(small(entries(*given), *(WEIGHTS if weights else ())).recipe, 120, 1).freezings


def test_durations_become_steps_and_each_towers_entries_are_in_order(small: Small) -> None:
    found = frozen(
        small,
        "tower: text, trainable: last 6, at: 1 epochs, lr_scale: 0.1, warmup: 3 steps",
        "tower: text, trainable: none",
        "tower: image, trainable: ' last  4', at: 36 samples, batch_norm: moving, norms: trainable",
    )
    assert [str(freezing) for freezing in found] == [
        "freeze.2 (image: last 4 from step 3)",
        "freeze.1 (text: none from step 0)",
        "freeze.0 (text: last 6 from step 10)",
    ]
    assert [(f.layers, f.lr_scale, f.warmup) for f in found] == [(4, 1.0, 0), (0, 1.0, 0), (6, 0.1, 3)]
    assert [(f.moving_statistics, f.norms_train) for f in found] == [
        (True, True),
        (False, False),
        (False, False),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["tower: text, trainable: none, at: 2 epochs"],
            r"from step 20\) begins after the run's end: the run has 20",
        ),
        (
            ["tower: text, trainable: none", "tower: text, trainable: all, at: 19 steps, warmup: 2 steps"],
            r"still warm up at the run's end: its warm-up takes 2 steps, after it the run has 1 step",
        ),
        (
            ["tower: text, trainable: none, at: 1 epochs", "tower: text, trainable: last 2, at: 10 steps"],
            r"freeze\.0 .* and freeze\.1 .* begin at the same step",
        ),
        (["tower: image, trainable: all, at: 5 steps"], r"changes nothing: the tower trains as without it"),
        (["tower: image, trainable: all"], r"freeze\.0 \(image: all from step 0\) changes nothing"),
        (
            ["tower: text, trainable: last 2", "tower: text, trainable: last 2, at: 5 steps, lr_scale: 0.5"],
            r"freeze\.1 .* changes nothing: the tower trains as freeze\.0 \(text: last 2 from step 0\)",
        ),
    ],
)
def test_an_entry_without_effect_is_refused(small: Small, given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        frozen(small, *given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tower: text, trainable: last 0", "got 'last 0'; should be none, all or 'last N'"),
        ("tower: text, trainable: null", "got nothing; should be none, all or 'last N'"),
        ("tower: text, trainable: none, lr_scale: 0.1", "lr_scale: is for what begins to train"),
        ("tower: text, trainable: none, warmup: 5 steps", "warmup: is for what begins to train"),
        ("tower: texts, trainable: none", "should be image or text"),
    ],
)
def test_an_entry_is_validated(small: Small, given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(entries(given))


def test_the_norms_of_a_frozen_tower_may_have_a_rate(small: Small) -> None:
    small(entries("tower: text, trainable: none, norms: trainable, lr_scale: 0.1"))


def test_frozen_from_the_start_needs_weights(small: Small) -> None:
    for trainable in ("none", "last 2"):
        with pytest.raises(
            UserError, match=r"freezes layers that were never trained: model\.text has no weig"
        ):
            frozen(small, f"tower: text, trainable: {trainable}", weights=False)
    frozen(small, "tower: text, trainable: none, at: 5 steps", weights=False)  # it trained before
    frozen(small, "tower: text, trainable: all, lr_scale: 0.1", weights=False)
    whole = small(entries("tower: text, trainable: none"), "model.weights=clip.safetensors")
    assert plan(whole.recipe, 120, 1).freezings


def test_a_run_without_it_keeps_its_name_and_one_with_it_is_read_back(small: Small) -> None:
    assert "freeze" not in result_keys(small())
    assert recipe_keys(small())["freeze"] == []
    loaded = small(entries("tower: text, trainable: last 2, at: 1 epochs"))
    assert result_keys(loaded)["freeze"] == [{"at": "1 epochs", "tower": "text", "trainable": "last 2"}]
    assert from_run(recipe_keys(loaded), settings_keys(loaded)).freeze == loaded.recipe.freeze
    assert from_run(recipe_keys(small()), settings_keys(small())).freeze == ()
