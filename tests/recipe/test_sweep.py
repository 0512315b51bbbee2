"""The section `sweep`: what its parts multiply to, what members are called, and what is refused."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcluster.errors import UserError
from clipcluster.recipe.load import load, load_sweep, result_keys
from clipcluster.recipe.sweep import Member, Sweep, read_sweep
from clipcluster.recipe.tree import Origin, tree_of
from clipcluster.runs.names import run_name


def sweep_of(section: Mapping[str, Any]) -> Sweep:
    return read_sweep(tree_of(section, Origin("here:1")), {})


def values(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [member.plain() for member in sweep_of(section).members]


@pytest.fixture
def members(recipe_file: Path) -> Callable[..., list[Member]]:
    """The members of the small recipe with this section, as YAML, and overrides."""

    def read(section: str, *overrides: str) -> list[Member]:
        recipe_file.write_text(f"{recipe_file.read_text()}{section}\n")
        found = load_sweep(recipe_file, overrides)
        assert found is not None
        return list(found.members)

    return read


def test_each_value_meets_each_of_the_others() -> None:
    section = {"optim.lr": [1, 2], "seed": [0, 1, 2]}
    assert values(section) == [{"optim.lr": lr, "seed": seed} for lr in (1, 2) for seed in (0, 1, 2)]


def test_the_parts_multiply() -> None:
    section = {
        "seed": [0, 1],
        "zip": {"data.batch_size": [12, 24], "optim": {"lr": [1, 2]}},
        "list": [{"model.embed_dim": 8}, {"loss": {"name": "siglip"}, "model.embed_dim": 16}],
    }
    found = values(section)
    assert len(found) == 8
    assert found[0] == {"seed": 0, "data.batch_size": 12, "optim.lr": 1, "model.embed_dim": 8}
    assert found[-1] == {
        "seed": 1,
        "data.batch_size": 24,
        "optim.lr": 2,
        "loss.name": "siglip",
        "model.embed_dim": 16,
    }


KEYS = {
    "optim.lr": {"log_uniform": [1e-4, 1e-2]},
    "optim.weight_decay": {"uniform": [0, 0.3]},
    "freeze.0.layers": {"integers": [1, 4]},
    "loss.name": ["clip", "siglip"],
}


@settings(max_examples=10)
@given(count=st.integers(1, 20), more=st.integers(0, 20), seed=st.integers(0, 99))
def test_draws_lie_within_their_bounds_and_stay_when_more_are_drawn(count: int, more: int, seed: int) -> None:
    first = values({"random": {"count": count, "seed": seed, "keys": KEYS}})
    assert values({"random": {"count": count + more, "seed": seed, "keys": KEYS}})[: len(first)] == first
    for drawn in first:
        assert 1e-4 <= drawn["optim.lr"] <= 1e-2
        assert drawn["optim.lr"] == float(f"{drawn['optim.lr']:.4g}")
        assert 0 <= drawn["optim.weight_decay"] <= 0.3
        assert drawn["freeze.0.layers"] in (1, 2, 3, 4)
        assert drawn["loss.name"] in ("clip", "siglip")


def test_a_draw_at_the_end_of_its_range_is_still_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipcluster.recipe.sweep._place", lambda seed, key, number: 1 - 2**-53)
    bounds = [2**31, 2**31 + 9]
    assert values({"random": {"count": 1, "keys": {"seed": {"integers": bounds}}}}) == [{"seed": bounds[1]}]


def test_draws_spread_over_their_range() -> None:
    found = values({"random": {"count": 400, "keys": KEYS}})
    rates = sorted(drawn["optim.lr"] for drawn in found)
    assert 0.8e-3 < rates[200] < 1.25e-3  # the geometric mean of the bounds
    decays = sorted(drawn["optim.weight_decay"] for drawn in found)
    assert 0.13 < decays[200] < 0.17
    for number in (1, 2, 3, 4):
        assert 60 < sum(drawn["freeze.0.layers"] == number for drawn in found) < 140
    assert values({"random": {"count": 400, "seed": 1, "keys": KEYS}}) != found


def test_a_draw_that_comes_twice_is_one_run() -> None:
    assert len(values({"random": {"count": 50, "keys": {"loss.name": ["clip", "siglip"]}}})) == 2


@pytest.mark.parametrize(
    ("section", "labels"),
    [
        ({"optim.lr": [3e-4, 1e-5]}, ["lr=0.0003", "lr=1e-05"]),
        ({"optim.lr": [0.1], "seed": [7]}, ["lr=0.1+seed=7"]),
        (
            {"model.image.weights": ["${W}/a b/", None], "model.text.weights": ["/w/gpt2.bin"]},
            ["image.weights=a_b+text.weights=gpt2.bin", "image.weights=null+text.weights=gpt2.bin"],
        ),
        ({"optim.betas": [[0.9, 0.98]]}, ["betas=0.9_0.98"]),
        ({"model.logit_bias": [{"init": -10}]}, ["logit_bias=init_-10"]),
        ({"list": [{}, {"seed": 1}]}, ["", "seed=1"]),
    ],
)
def test_a_label_says_what_differs(section: dict[str, Any], labels: list[str]) -> None:
    found = [member.label for member in sweep_of(section).members]
    assert found == labels
    for label in filter(None, labels):
        assert re.fullmatch(r"small-.*-[0-9a-f]{8}", run_name(f"small-{label}", {}))


def test_members_are_recipes_of_their_own(members: Callable[..., list[Member]], recipe_file: Path) -> None:
    found = members("sweep: {optim.lr: [1e-3, 2e-3], data.workers: [0, 1]}", "seed=3")
    loaded = [load(recipe_file, ["seed=3"], member=member) for member in found]
    assert [(one.recipe.optim.lr, one.recipe.data.workers) for one in loaded] == [
        (1e-3, 0),
        (1e-3, 1),
        (2e-3, 0),
        (2e-3, 1),
    ]
    assert {one.recipe.seed for one in loaded} == {3}
    assert loaded[3].title == "small-lr=0.002+workers=1"
    alone = load(recipe_file, ["seed=3", "sweep=null", "optim.lr=2e-3"])
    assert result_keys(alone) == result_keys(loaded[3])  # the same run, however it was asked for


def test_the_command_line_replaces_values(members: Callable[..., list[Member]]) -> None:
    found = members("sweep: {optim.lr: [1e-3, 2e-3]}", "sweep.optim.lr=[1, 2, 3]", "sweep.seed=[0]")
    assert [member.plain() for member in found] == [{"optim.lr": lr, "seed": 0} for lr in (1, 2, 3)]


def test_an_error_in_a_value_names_its_line(members: Callable[..., list[Member]], recipe_file: Path) -> None:
    last = members("sweep:\n  optim.lr: [1e-3]\n  data.batch_size:\n    - 12\n    - many")[-1]
    line = len(recipe_file.read_text().splitlines())
    with pytest.raises(UserError, match=rf"small.yaml:{line}: data.batch_size: got 'many'"):
        load(recipe_file, member=last)


def test_one_run_cannot_be_read_of_a_sweep(members: Callable[..., list[Member]], recipe_file: Path) -> None:
    found = members("sweep: {optim.lr: [1e-3, 2e-3]}")
    with pytest.raises(UserError, match=r"a sweep of 2 runs; sweep=null makes it one run"):
        load(recipe_file)
    with pytest.raises(UserError, match=r"optim.lr=5.*swept; give sweep.optim.lr="):
        load(recipe_file, ["optim.lr=5"], member=found[0])
    whole = sweep_of({"list": [{"data.image": None}]}).members[0]  # would replace what is given inside
    with pytest.raises(UserError, match=r"data.image.size=8.*swept; give sweep.data.image="):
        load(recipe_file, ["data.image.size=8"], member=whole)
    assert load_sweep(recipe_file, ["sweep=null"]) is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("3", "should be a section such as"),
        ("{parallel: 2}", "gives no key values"),
        ("{optim.lr: 3e-4}", "sweep.optim.lr: should be a list of values"),
        ("{optim.lr: []}", "should be a list of values"),
        ("{name: [a, b]}", "sweep.name: a sweep has the recipe's name"),
        ("{optim.lr: [1], zip: {optim.lr: [2]}}", "is given values twice"),
        ("{freeze: [[]], list: [{freeze.0.at: 1 epochs}]}", r"is given values twice \(freeze\)"),
        ("{zip: {optim.lr: [1, 2], seed: [1]}}", "equally long; they have: optim.lr 2, seed 1"),
        ("{zip: [1]}", "sweep.zip: should be a mapping"),
        ("{list: [3]}", "sweep.list: its entries should be mappings"),
        ("{random: {keys: {seed: [1]}}}", "the key count is missing"),
        (
            "{random: {count: 0, keys: {seed: [1]}}}",
            "sweep.random.count: should be a whole number, at least 1",
        ),
        ("{random: {count: 1, key: {seed: [1]}}}", "random.key: unknown key"),
        (
            "{random: {count: 1, keys: {optim.lr: {uniform: [0, 1], integers: [0, 1]}}}}",
            "to choose from",
        ),
        ("{random: {count: 1, keys: {optim.lr: {log_uniform: [0, 1]}}}}", "LOW above zero, then HIGH"),
        ("{random: {count: 1, keys: {seed: {integers: [0, 1.5]}}}}", "two whole numbers"),
        ("{seed: [1], parallel: none}", "sweep.parallel: should be a whole number"),
    ],
)
def test_what_is_wrong_is_said(members: Callable[..., list[Member]], section: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        members(f"sweep: {section}")
    assert str(caught.value).startswith("small.yaml:11: sweep")
