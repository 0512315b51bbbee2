import re
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from clipcluster.recipe.sections.base import Mark, extra_of, sections_of, walk
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.recipe.sections.data import Source
from clipcluster.recipe.sections.image import Image
from clipcluster.recipe.sections.model import TextTower
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.sections.values import MEANS

KEYS = [pytest.param(field, id=".".join(path)) for path, field in walk(Recipe) if not sections_of(field)]
SECTIONS = [pytest.param(field, id=".".join(path)) for path, field in walk(Recipe) if sections_of(field)]


def recipe_of(**changes: Any) -> dict[str, Any]:
    """A valid recipe as a mapping, with sections replaced."""
    return {
        "name": "small",
        "data": {"train": [{"shards": "shards"}], "batch_size": 4},
        "model": {"image": {"timm": "convnext_atto"}, "text": {"arch": "gpt2"}},
        "optim": {"lr": 1e-3},
        "train": {"duration": "2 epochs"},
        **changes,
    }


@pytest.mark.parametrize("field", KEYS)
def test_every_key_is_described_and_marked(field: FieldInfo) -> None:
    assert field.description is not None
    assert field.description.endswith(".")
    assert extra_of(field)["mark"] in get_args(Mark)


CLASSIFIER = {"image": {"timm": "convnext_atto"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": CLASSIFIER}, "the key model.text is missing: task contrastive needs a text tower"),
        (
            {"task": "classify"},
            "model.text: task classify does not use it; remove it, or set task to contrastive or distill",
        ),
        (
            {"task": "classify", "model": {**CLASSIFIER, "embed_dim": 8}},
            "model.embed_dim: task classify does not use it",
        ),
        (
            {"task": "classify", "model": {**CLASSIFIER, "logit_scale": {"init": 2.0}}},
            "model.logit_scale: task classify does not use it",
        ),
        (
            {"model": {**recipe_of()["model"], "classes": 3}},
            "model.classes: task contrastive does not use it",
        ),
        (
            {"evaluate": {"classification": ["x"]}},
            "evaluate.classification: task contrastive cannot be measured so; use evaluate.retr",
        ),
        (
            {"task": "classify", "model": CLASSIFIER, "evaluate": {"zero_shot": ["x"]}},
            "evaluate.zero_shot: task classify cannot be measured so; use evaluate.classification",
        ),
        ({"loss": {"name": "siglip"}}, "loss.name: siglip needs a bias: set model.logit_bias to {init: -10}"),
        (
            {"model": {**recipe_of()["model"], "logit_bias": {}}},
            "model.logit_bias: the loss clip is the same with any bias; remove it",
        ),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        Recipe.model_validate(recipe_of(**changes))


def test_a_recipe_read_back_whole_is_the_same() -> None:
    for recipe in (recipe_of(), recipe_of(task="classify", model={**CLASSIFIER, "classes": 3})):
        first = Recipe.model_validate(recipe)
        assert Recipe.model_validate(first.model_dump(mode="json")) == first


@pytest.mark.parametrize("field", SECTIONS)
def test_every_section_is_described(field: FieldInfo) -> None:
    assert field.description is not None
    assert field.description.endswith(".")


def test_the_walk_sees_nested_keys() -> None:
    paths = {".".join(path) for path, _ in walk(Recipe)}
    assert {"data.train.*.shards", "train.ema.decay", "checkpoint.keep.best.metric", "cluster.nodes"} <= paths
    assert len(KEYS) > 60


@pytest.mark.parametrize(
    ("path", "mark"),
    [
        ("seed", "result"),
        ("data.batch_size", "result"),
        ("data.train.*.shards", "result"),
        ("data.train.*.index", "record"),
        ("data.text.captions", "result"),
        ("data.order.lanes", "result"),
        ("data.workers", "speed"),
        ("model.image.weights", "result"),
        ("optim.warmup", "result"),
        ("train.precision", "result"),
        ("train.ema.decay", "result"),
        ("train.non_finite.limit", "result"),
        ("train.micro_batch", "speed"),
        ("train.log_every", "record"),
        ("name", "record"),
        ("checkpoint.every", "record"),
        ("evaluate.batch_size", "record"),
        ("evaluate.where", "record"),
        ("evaluate.cluster.time", "record"),
        ("cluster.nodes", "record"),
    ],
)
def test_what_a_key_decides(path: str, mark: str) -> None:
    marks = {".".join(keys): extra_of(field).get("mark") for keys, field in walk(Recipe)}
    assert marks[path] == mark


def test_a_recipe_is_frozen() -> None:
    recipe = Recipe.model_validate(recipe_of())
    with pytest.raises(ValidationError):
        recipe.seed = 3
    with pytest.raises(ValidationError):
        recipe.optim.lr = 3.0


def test_a_recipe_survives_json() -> None:
    recipe = Recipe.model_validate(
        recipe_of(
            checkpoint={"every": "15 min", "keep": {"every": "5 epochs", "best": {"metric": "val/t2i_r1"}}},
            cluster={"nodes": "2-4", "mem": "200 GB", "time": "4 h", "environment": {"A": 1}},
            train={"duration": "0.5 epochs", "ema": {"decay": 0.99}},
        )
    )
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert recipe.cluster.environment == {"A": "1"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [("openai", MEANS["openai"]), ("imagenet", MEANS["imagenet"]), ([0, 0.5, 1], (0, 0.5, 1))],
)
def test_colours_by_name_or_number(value: Any, expected: tuple[float, ...]) -> None:
    assert Image(mean=value).mean == expected


@pytest.mark.parametrize(
    ("gpus", "tasks", "ranks"), [(4, None, 4), (0, None, 1), (0, 2, 2), (8, 4, 4), (1, None, 1)]
)
def test_ranks_of_a_node(gpus: int, tasks: int | None, ranks: int) -> None:
    assert Cluster(gpus_per_node=gpus, tasks_per_node=tasks).ranks_per_node == ranks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"duration": "2 epochs", "ema": {"decay": 1.0}}}, "less than 1"),
        ({"checkpoint": {"keep": {"last": 1}}}, "at least 2: the newest"),
        ({"data": {"train": [], "batch_size": 4}}, "at least one source"),
        (
            {"data": {"train": [{"shards": "a", "weight": 2}, {"shards": "b"}], "batch_size": 4}},
            "source 1 has no weight",
        ),
        ({"data": {"train": [{"shards": []}], "batch_size": 4}}, "a path or a list of paths"),
        ({"data": {"train": [{"shards": "a", "captions_in": "yaml"}], "batch_size": 4}}, "json:FIELD"),
        ({"data": {"train": [{"shards": "a", "captions_in": {"txt": 0}}], "batch_size": 4}}, "a positive"),
        ({"data": {"train": [{"shards": "a", "captions_in": {"line": 1}}], "batch_size": 4}}, "mean 'lines'"),
        ({"data": {"train": [{"shards": "a", "captions_in": {}}], "batch_size": 4}}, "at least one choice"),
        (
            {
                "data": {
                    "train": [{"shards": "a"}, {"shards": "a", "captions_in": {"txt": 1}}],
                    "batch_size": 4,
                    "text": {"captions": "all"},
                }
            },
            "source 1 draws its captions by probabilities",
        ),
        ({"optim": {"lr": 1e-3, "betas": [0.9, 1.0]}}, "below 1"),
        ({"optim": {"lr": float("inf")}}, "finite"),
        ({"optim": {"lr": float("nan")}}, "finite"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"name": "a/b"}, "pattern"),
        ({"name": ".hidden"}, "pattern"),
    ],
)
def test_values_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(recipe_of(**changes))


@pytest.mark.parametrize(
    "change",
    [
        {"crop_scale": [0, 1]},
        {"crop_scale": [0.5, 1.5]},
        {"crop_scale": [0.9, 0.5]},
        {"crop_ratio": [2, 1]},
        {"std": [0, 1, 1]},
        {"size": 0},
        {"size": 1.5},
        {"size": True},
        {"mean": "clip"},
        {"interpolation": "nearest"},
    ],
)
def test_images_that_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Image(**change)


@pytest.mark.parametrize("name", ["num_classes", "img_size", "pretrained"])
def test_arguments_that_other_keys_decide_are_refused(name: str) -> None:
    tower = {"timm": "resnet18", "args": {name: 1}}
    with pytest.raises(ValidationError, match=r"is decided by .*; remove it"):
        Recipe.model_validate(recipe_of(model={"image": tower, "text": {"arch": "gpt2"}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "should have one of hf, arch"),
        ({"hf": "gpt2", "arch": "gpt2"}, "should have one of hf, arch"),
        ({"hf": "gpt2", "config": {"n_layer": 2}}, "not permitted"),
        ({"arch": "gpt2", "weights": "pretrained"}, "belong to a model named by hf"),
    ],
)
def test_text_towers_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(TextTower).validate_python(changes)


def test_numbers_may_be_written_as_text() -> None:
    assert Source(shards="a", weight="7e-1").weight == 0.7  # type: ignore[arg-type]
    assert Image(size=2e2).size == 200  # type: ignore[arg-type]
    assert Image(size="1_000").size == 1000  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["A-B", "", "1A", "A=B", "A B", "A;B"])
def test_a_variable_is_named_as_a_shell_names_it(name: str) -> None:
    with pytest.raises(ValidationError, match="cannot name a variable"):
        Cluster(environment={name: "1"})
    assert Cluster(environment={"_a1": "x"}).environment == {"_a1": "x"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"augment": "rand-m9-mstd0.5-inc1"}, ""),
        ({"augment": "rand-n3-p0.7-t3aw"}, ""),
        ({"augment": "randm9"}, "such as rand-m9-mstd0.5-inc1"),
        ({"augment": "rand-m9-foo1"}, "such as rand-m9-mstd0.5-inc1"),
        ({"color_jitter": [0.1, 0.2]}, "a number, or a list of 3 or 4"),
        ({"color_jitter": [0.1, 0.2, 0.3, 0.6]}, "the fourth (hue) at most 0.5"),
        ({"random_erasing": {"probability": 0}}, "greater than 0"),
        ({"evaluation": {"crop_pct": 1.2}}, "less than or equal to 1"),
    ],
)
def test_augmentation_is_checked_without_timm(keys: dict[str, Any], said: str) -> None:
    if not said:
        assert Image(**keys).augment == keys["augment"]
        return
    with pytest.raises(ValidationError, match=re.escape(said)):
        Image(**keys)


def test_one_strength_of_color_jitter_is_three() -> None:
    assert Image(color_jitter=0.4).color_jitter == (0.4, 0.4, 0.4, 0.0)
    read_back = Image(**Image(color_jitter=[0.4, 0.3, 0.2, 0.1]).model_dump(mode="json"))
    assert read_back.color_jitter == (0.4, 0.3, 0.2, 0.1)


def test_the_job_of_an_evaluation_is_small_and_asks_for_what_its_section_says() -> None:
    training = {"nodes": "2-4", "gpus_per_node": 8, "tasks_per_node": 8, "mem": "500 GB", "grace": "90 s"}
    recipe = Recipe.model_validate(recipe_of(cluster={**training, "partition": "low", "account": "vision"}))
    asked = recipe.evaluate.cluster_of_job(recipe.cluster)
    assert (str(asked.nodes), asked.gpus_per_node, asked.ranks_per_node) == ("1", 1, 1)
    assert (asked.mem, asked.time, asked.grace) == (
        recipe.cluster.mem,
        recipe.cluster.time,
        recipe.cluster.grace,
    )
    assert (asked.partition, asked.account) == ("low", "vision")
    own = {"gpus_per_node": 2, "mem": "64 GB", "time": "30 min", "partition": "short"}
    recipe = Recipe.model_validate(recipe_of(cluster=training, evaluate={"where": "job", "cluster": own}))
    asked = recipe.evaluate.cluster_of_job(recipe.cluster)
    assert (asked.gpus_per_node, asked.ranks_per_node, str(asked.mem)) == (2, 2, "64 GB")
    assert (str(asked.time), asked.partition, asked.grace) == ("30 min", "short", None)
    on_cpu = Recipe.model_validate(recipe_of(cluster={"gpus_per_node": 0, "tasks_per_node": 4}))
    asked = on_cpu.evaluate.cluster_of_job(on_cpu.cluster)
    assert (asked.gpus_per_node, asked.ranks_per_node) == (0, 1)
    assert Cluster.model_validate(asked.model_dump(mode="json")) == asked
