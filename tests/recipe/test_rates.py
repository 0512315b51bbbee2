"""Learning rates from the global batch, and those of the parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.errors import UserError
from clipcluster.recipe.load import Loaded, from_run, recipe_keys, result_keys, settings_keys
from clipcluster.recipe.rates import describe_rates, rates
from clipcluster.recipe.sections.optim import PerBatch

Small = Callable[..., Loaded]


def test_a_rate_per_batch_scales_with_the_global_batch(small: Small) -> None:
    linear = "optim.lr={base: 5e-4, per: 256}"
    recipe = small(linear, "data.batch_size=4096").recipe
    assert rates(recipe).peak == 0.008
    assert describe_rates(recipe) == "0.008 = 0.0005 x 4,096 / 256"
    root = small(linear, "optim.lr.scaling=sqrt", "data.batch_size=4096").recipe
    assert rates(root).peak == 0.002
    assert describe_rates(root) == "0.002 = 0.0005 x sqrt(4,096 / 256)"
    assert rates(small("optim.lr=0.5").recipe).peak == 0.5


@given(st.floats(1e-8, 1.0), st.integers(1, 4096), st.integers(1, 4096))
def test_linear_and_square_root(base: float, per: int, batch: int) -> None:
    assert PerBatch(base, per).at(batch) == pytest.approx(base * batch / per)
    assert PerBatch(base, per, "sqrt").at(batch) ** 2 == pytest.approx(base**2 * batch / per)
    assert PerBatch(base, batch, "sqrt").at(batch) == PerBatch(base, batch).at(batch) == base


def test_parts_have_rates_of_their_own(small: Small) -> None:
    recipe = small("optim.lr=1e-3", "optim.image.lr=1e-4", "optim.logit_scale.lr={base: 1e-5, per: 6}").recipe
    found = rates(recipe)  # 12 samples
    assert (found.peak, found.text) == (1e-3, 1.0)
    assert found.image == pytest.approx(0.1)
    assert found.logit_scale == pytest.approx(0.02)
    assert describe_rates(recipe) == "0.001; image tower 0.0001; logit scale 2e-05 = 1e-05 x 12 / 6"


def test_it_survives_the_run_folder_and_names_the_run(small: Small) -> None:
    loaded = small("optim.lr={base: 5e-4, scaling: sqrt}", "optim.text.weight_decay=0")
    written = {"base": 5e-4, "per": 256, "scaling": "sqrt"}
    assert result_keys(loaded)["optim"] == {"lr": written, "text": {"weight_decay": 0.0}}
    assert from_run(recipe_keys(loaded), settings_keys(loaded)).optim == loaded.recipe.optim


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.min_lr=1e-3"], r"optim\.min_lr 0\.001 is not below optim\.lr 0\.001"),
        (["optim.lr=0", "optim.image.lr=1"], r"optim\.lr is 0 and optim\.image\.lr is 1"),
        (["optim.lr={per: 256}"], "base is missing; should be a number, at least 0"),
        (["optim.lr={base: x}"], "base is x; should be a number"),
        (["optim.lr={base: 1, per: 0}"], "per is 0; should be a whole number of samples"),
        (["optim.lr={base: 1, scaling: cubic}"], "scaling is cubic; should be linear or sqrt"),
        (["optim.lr={bse: 1}"], r"has the key bse; should have base, per, scaling; did you mean base\?"),
        (["optim.lr=[1]"], r"should be a number, or \{base: 5e-4"),
        (["optim.schedule=wsd"], "wsd needs optim.cooldown, such as 20%"),
        (["optim.cooldown=5%"], "schedule cosine has none; remove it, or set schedule to wsd"),
        (["optim.schedule=constant", "optim.min_lr=1e-6"], "schedule constant has none; remove it, or use"),
        (["optim.weight_decay=0", "optim.weight_decay_end=0.1"], "weight_decay_end=0.1: has no effect"),
        (["optim.name=lamb", "optim.eps=1e-8"], r"for adamw; lamb takes it in optim.args: \{eps: …\}"),
        (["optim.args={betas: [0.1, 0.2]}"], "adamw, which has optim.betas"),
        (["optim.layer_decay=0.7"], r"unknown key; did you mean optim\.image\.layer_decay\?"),
    ],
)
def test_what_is_refused(small: Small, overrides: list[str], said: Any) -> None:
    with pytest.raises(UserError, match=said):
        rates(small(*overrides).recipe)
