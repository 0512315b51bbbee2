import contextlib
import copy
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from clipcluster.errors import UserError
from clipcluster.recipe.files import RECIPES
from clipcluster.recipe.load import (
    Loaded,
    from_run,
    load,
    override,
    recipe_keys,
    result_keys,
    settings_keys,
)
from clipcluster.recipe.problems import EXPECTED
from clipcluster.recipe.sections.base import walk
from clipcluster.recipe.sections.model import Dual, HfTextTower
from clipcluster.recipe.sections.recipe import Recipe

Small = Callable[..., Loaded]


def message_of(small: Small, *overrides: str, **environ: str) -> str:
    with pytest.raises(UserError) as caught:
        small(*overrides, **environ)
    return str(caught.value)


# What is read.


def test_a_recipe_is_read(small: Small) -> None:
    loaded = small()
    assert loaded.recipe.name == "small"
    assert loaded.recipe.optim.lr == 1e-3
    assert loaded.recipe.train.non_finite.limit == 10


@pytest.mark.parametrize("text", ["7e-4", "7.0e-4", '"7e-4"', ".0007", "0.000_7"])
def test_numbers_however_written(small: Small, recipe_file: Path, text: str) -> None:
    assert small(f"optim.lr={text}").recipe.optim.lr == 7e-4
    recipe_file.write_text(recipe_file.read_text().replace("1e-3", text))
    assert small().recipe.optim.lr == 7e-4


def test_numbers_within_free_arguments_are_numbers(small: Small) -> None:
    args = small("model.image.args={drop_path_rate: 1e-1, depths: [1_0, 2]}").recipe.model.image.args
    assert args == {"drop_path_rate": 0.1, "depths": [10, 2]}


def test_overrides_reach_lists_and_absent_sections(small: Small) -> None:
    recipe = small(
        "data.train.0.captions_in=lines",
        "checkpoint.keep.best={metric: val/t2i_r1}",
        "train.ema.decay=0.9",
        "cluster.nodes=2-4",
        "optim.betas=[0.8, 0.9]",
        "evaluate.zero_shot=[a, b]",
    ).recipe
    assert recipe.data.train[0].captions_in == "lines"
    assert recipe.checkpoint.keep.best is not None
    assert recipe.train.ema is not None
    assert recipe.train.ema.decay == 0.9
    assert (recipe.cluster.nodes.least, recipe.cluster.nodes.most) == (2, 4)
    assert recipe.optim.betas == (0.8, 0.9)
    assert len(recipe.evaluate.zero_shot) == 2


def test_a_later_override_wins(small: Small) -> None:
    assert small("seed=1", "seed=2").recipe.seed == 2
    assert small("train.ema.decay=0.9", "train.ema=null").recipe.train.ema is None


# What is refused.


def test_an_unknown_key_names_the_nearest(small: Small, recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + "checkpoint: {evry: 15 min}\n")
    assert message_of(small) == "small.yaml:11: checkpoint.evry: unknown key; did you mean checkpoint.every?"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=3", "unknown key; did you mean optim.lr?"),
        ("data.image.std=[0, 0, 1]", "got [0, 0, 1]; should be above zero"),
        ("optm.lr=3", "unknown key; did you mean optim?"),
        ("lr=3", "unknown key; did you mean optim.lr?"),
        ("data.train.0.shard=x", "unknown key; did you mean data.train.0.shards?"),
        ("train.weight_decay=1", "unknown key; did you mean optim.weight_decay?"),
        (
            "optim.zzz=1",
            "unknown key; optim has the keys name, args, lr, min_lr, weight_decay, weight_decay_end",
        ),
        ("optim.lr=high", "got 'high'; should be a number"),
        ("data.batch_size=1.5", "got 1.5; should be a whole number"),
        ("data.batch_size=true", "got true; should be a whole number"),
        ("data.image.flip=7", "got 7; should be true or false"),
        ("name=2024", "got 2024; should be text; write it in quotes"),
        ("optim=3", "got 3; should be a section with the keys name, args, lr"),
        (
            "optim.warmup=100",
            "got 100; a duration is 'N steps', 'N samples', 'N epochs' or 'N%' of the run; did you mean "
            "100 steps?",
        ),
        (
            "train.duration=100",
            "the length of a run is 'N steps', 'N samples' or 'N epochs'; did you mean 100 steps?",
        ),
        ("train.duration=50%", "got '50%'; the length of a run is 'N steps', 'N samples' or 'N epochs'"),
        ("data.train=data/pairs", "should be a list; write 'data.train=[{shards: data/pairs}]'"),
        ("data.train={shards: a}", "should be a list; write 'data.train=[{shards: a}]'"),
        ("data.train=[a, b]", "2 errors"),
        ("data.train.0=a", "should be a section with the keys shards, weight, repeat"),
        ("data.train.0=a", "; write 'data.train.0={shards: a}'"),
        ("model.image=convnext_atto", "; write 'model.image={timm: convnext_atto}'"),
        ("model.text=gpt2", "should be a section with the keys hf, weights, missing, pool, or arch, config"),
        ("model.text=gpt2", "; write 'model.text={hf: gpt2}' or 'model.text={arch: gpt2}'"),
        ("model.text={pool: mean}", "should have exactly one of the keys hf, arch, clip"),
        ("model.text={arhc: gpt2}", "unknown key arhc; did you mean model.text.arch?"),
        ("model.text={hf: gpt2, confg: {}}", "unknown key"),
        (
            "model.text={hf: gpt2, config: {n_layer: 2}}",
            "belongs to model.text with the key arch",
        ),
        ("model.text={clip: {width: 10, heads: 3}}", "3 does not divide width 10"),
        ("model.text.wieghts=x", "unknown key; did you mean model.text.weights?"),
        ("model.projection_bias=[words]", "should be image or text"),
        ("model.text.pool=men", "should be last or first or mean or pooler; did you mean mean?"),
        ("model.text.weights=pretrained", "belong to a model named by hf"),
        ("model.image.weights=pretrained", "belong to a model named by hf"),
        ("model.image.mask_ratio=1", "got 1; should be less than 1"),
        (
            "model.image={hf: org/vit, args: {}, timm: vit}",
            "has timm and hf; should have exactly one of them",
        ),
        ("train.ema=0.99", "; write 'train.ema={decay: 0.99}'"),
        ("train.ema=true", "should be a section with the keys decay, warmup, device; write 'train.ema={}'"),
        ("train.ema=false", "with the keys decay, warmup, device; write 'train.ema=null'"),
        ("task=contrasive", "should be contrastive or classify or distill; did you mean contrastive?"),
        ("optim.schedule=cosin", "should be cosine or linear or constant or wsd; did you mean cosine?"),
        ("seed=-1", "got -1; should be at least 0"),
        ("train.ema={decay: 1}", "got 1; should be less than 1"),
        ("name=a/b", "should be letters, digits, '.', '_' and '-'"),
        ("data.batch_size=1e400", "should be a finite number"),
        ("checkpoint.every=5 weeks", "a time is 'N s'"),
        ("cluster.mem=200", "got 200; memory is"),
        ("checks.allow=all", "should be a list of few-steps, learning-rate, long-captions,"),
        ("checks.allow=few-steps", "should be a list; write 'checks.allow=[few-steps]'"),
        ("optim.name=[lamb]", "got ['lamb']; should be text"),
        ("distill={alpha: 1}", "unknown key; did you mean data.mixup.alpha? distill has the keys weight,"),
        ("data.image.crop_pct=0.9", "unknown key; did you mean data.image.evaluation.crop_pct?"),
        ("evaluate.zero_shot=abc", "got 'abc'; should be a list; write 'evaluate.zero_shot=[{shards: abc}]'"),
        ("optim.betas=[0.9]", "got [0.9]; should be a list of 2 numbers"),
        ("optim.betas=[0.9, x]", "got 'x'; should be a number"),
        ("train.precision=FP16", "should be fp32 or tf32 or bf16 or fp16; did you mean fp16?"),
        ("train.precision=float16", "should be fp32 or tf32 or bf16 or fp16; did you mean fp16?"),
        ("train.precision=bfloat16", "did you mean bf16?"),
        ("train.precision=fp8", "should be fp32 or tf32 or bf16 or fp16"),
        (
            "optim={lr: 1",
            "the value is not YAML: expected ',' or '}', but got '<stream end>'; put it in quotes",
        ),
        ("data.train.3.shards=x", "data.train is a list: '3' should be 0"),
        ("seed.x=1", "seed is a value"),
        ("extends=base.yaml", "extends can only be written in a file"),
    ],
)
def test_an_override_that_is_wrong(small: Small, override: str, said: str) -> None:
    message = message_of(small, *(("seed=0",) if override.startswith("seed") else ()), override)
    assert message.startswith(f"from the command line: {override}: ") or "errors" in said
    assert said in message


def test_a_model_is_of_towers_or_whole(small: Small) -> None:
    assert "has both towers; remove image and text, or" in message_of(small, "model.dual={hf: org/x}")
    assert "image is missing; write image (and text), or dual" in message_of(small, "model.image=null")
    whole = ("model.image=null", "model.text=null", "model.dual={hf: org/x, weights: pretrained}")
    assert small(*whole).recipe.model.dual == Dual(hf="org/x", weights="pretrained")
    both = "has other weights than model.weights, which are those of the whole model; remove one"
    assert f"model.dual.weights: {both}" in message_of(small, *whole, "model.weights=w.pt")
    assert f"model.image.weights=a: {both}" in message_of(
        small, "model.image.weights=a", "model.weights=w.pt"
    )


def test_a_wrong_shape_in_a_file_is_answered_as_a_file_has_it(small: Small, recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("\n    - {shards: shards/train}", " data/pairs"))
    said = "data.train: got 'data/pairs'; should be a list; write data.train: [{shards: data/pairs}]"
    assert message_of(small) == f"small.yaml:3: {said}"


def test_two_kinds_of_a_tower_are_refused(small: Small) -> None:
    said = (
        "has hf and arch; should have exactly one of them: null removes the other, as in model.text.arch=null"
    )
    assert message_of(small, "model.text.hf=gpt2") == f"from the command line: model.text.hf=gpt2: {said}"
    text = small("model.text.hf=org/gpt2", "model.text.arch=null", "model.text.config=null").recipe.model.text
    assert text == HfTextTower(hf="org/gpt2")


def test_all_errors_come_at_once_in_the_order_of_the_lines(small: Small, recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("batch_size: 12", "batch_sise: ${NOPE}"))
    lines = message_of(small, "optim.lr=x").splitlines()
    assert lines[0] == "small.yaml: 3 errors"
    assert lines[
        1
    ] == "  small.yaml:2: data: the key data.batch_size is missing (Global batch: samples of one " + (
        "optimizer step, over all ranks)"
    )
    assert lines[2].startswith(
        "  small.yaml:5: data.batch_sise: the environment variable NOPE is not set; export"
    )
    assert lines[3].startswith("  from the command line: optim.lr=x: got 'x'")


def test_a_recipe_without_its_keys_says_what_is_missing(small: Small, recipe_file: Path) -> None:
    recipe_file.write_text("seed: 1\n")
    message = message_of(small)
    for key in ("name", "data", "model", "optim", "train"):
        assert f"small.yaml:1: the key {key} is missing" in message


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
def test_an_empty_file_is_one_error(small: Small, recipe_file: Path, text: str) -> None:
    recipe_file.write_text(text)
    assert message_of(small).splitlines() == [
        "small.yaml is empty; write at least one key, such as name: my-run"
    ]


def test_a_tab_is_named(small: Small, recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("  batch_size", "\tbatch_size"))
    assert message_of(small) == "small.yaml:5: a tab character; YAML takes spaces instead"


def test_a_run_of_before_the_kinds_of_towers_is_read(small: Small) -> None:
    loaded = small()
    older = recipe_keys(loaded)
    older["model"]["text"] |= {"hf": None, "weights": None}
    assert from_run(older, settings_keys(loaded)) == loaded.recipe
    older["model"]["text"] |= {"hf": "org/gpt2", "arch": None, "config": {}}
    assert from_run(older, settings_keys(loaded)).model.text == HfTextTower(hf="org/gpt2")


def test_a_percentage_is_of_the_run(small: Small) -> None:
    loaded = small("optim.warmup=5%", "evaluate.every=12.5 %")
    assert str(loaded.recipe.optim.warmup) == "5%"
    assert str(loaded.recipe.evaluate.every) == "12.5%"
    assert from_run(recipe_keys(loaded), settings_keys(loaded)) == loaded.recipe


def test_a_wrong_type_is_said_once(small: Small) -> None:
    assert message_of(small, "optim.lr=high").endswith("sqrt}, scaled to the global batch")
    assert message_of(small, "data.batch_size=1.5").endswith("got 1.5; should be a whole number")


def test_a_missing_recipe_names_the_nearest(small: Small, recipe_file: Path) -> None:
    with pytest.raises(UserError, match=r"smal\.yaml: no such recipe; did you mean .*small\.yaml\?"):
        load(recipe_file.parent / "smal.yaml")
    with pytest.raises(UserError, match=r"did you mean .*small\.yaml\?"):
        load(recipe_file.parent / "small")
    for name in ("recipes/digits.yaml", "digits.yaml", "digits"):
        with pytest.raises(UserError, match=f"did you mean {RECIPES}/digits.yaml"):
            load(recipe_file.parent / name)
    with pytest.raises(UserError, match=r" has small\.yaml"):
        load(recipe_file.parent / "entirely-different.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load(recipe_file.parent)
    with pytest.raises(UserError, match=r"the folder .*nowhere does not exist"):
        load(recipe_file.parent / "nowhere" / "x.yaml")
    (recipe_file.parent / "recipes").mkdir()
    with pytest.raises(UserError, match=r"/recipes has no recipe"):
        load(recipe_file.parent / "recipes" / "entirely-different.yaml")
    (recipe_file.parent / "recipes" / "digits.yaml").touch()
    with pytest.raises(UserError, match=r"did you mean .*/recipes/digits\.yaml\?"):
        load(recipe_file.parent / "digits.yaml")


# Extends.


def test_extends_merges_and_remembers_the_file(small: Small, recipe_file: Path) -> None:
    child = recipe_file.parent / "sub" / "child.yaml"
    child.parent.mkdir()
    child.write_text("extends: ../small.yaml\nname: child\nmodel:\n  text: {config: {n_head: 2}}\n")
    recipe = load(child, (), {}).recipe
    assert recipe.name == "child"
    assert recipe.model.text.config == {"n_layer": 1, "n_head": 2}
    recipe_file.write_text(recipe_file.read_text().replace("lr: 1e-3", "lr: fast"))
    with pytest.raises(UserError, match=r"^small\.yaml:9: optim\.lr: got 'fast'"):
        load(child, (), {})


def test_extends_finds_the_shipped_recipes(small: Small, recipe_file: Path) -> None:
    recipe_file.write_text("extends: base.yaml\n" + recipe_file.read_text())
    assert small().recipe.checkpoint.keep.last == 3
    (recipe_file.parent / "base.yaml").write_text("checkpoint: {keep: {last: 7}}\n")
    assert small().recipe.checkpoint.keep.last == 7


def test_extends_of_a_missing_file_names_the_nearest(small: Small, recipe_file: Path) -> None:
    recipe_file.write_text("# a comment\nextends: bas.yaml\n" + recipe_file.read_text())
    message = message_of(small)
    assert message.startswith("small.yaml:2: extends: bas.yaml does not exist")
    assert message.endswith("did you mean base.yaml?")


def test_extends_in_a_circle(small: Small, recipe_file: Path) -> None:
    (recipe_file.parent / "other.yaml").write_text("extends: small.yaml\n")
    recipe_file.write_text("extends: other.yaml\n")
    assert "extends forms a circle: small.yaml -> other.yaml -> small.yaml" in message_of(small)


@pytest.mark.parametrize("value", ["[a.yaml, b.yaml]", "{a: b}", "3", ""])
def test_extends_names_one_file(small: Small, recipe_file: Path, value: str) -> None:
    recipe_file.write_text(f"extends: {value}\n")
    assert "extends: should be the name of one file" in message_of(small)


# The environment.


def test_the_environment_fills_in(small: Small) -> None:
    assert small("data.batch_size=${BATCH}", BATCH="1_2").recipe.data.batch_size == 12
    assert small("data.batch_size=${BATCH:-24}").recipe.data.batch_size == 24
    assert small("data.batch_size=${BATCH:-24}", BATCH="").recipe.data.batch_size == 24
    assert small("name=a-${A}-${B:-b}", A="x").recipe.name == "a-x-b"
    assert small("cluster.partition=${P:-null}").recipe.cluster.partition is None
    assert small(
        "cluster.environment={HF_HOME: '${SCRATCH}/hf'}", SCRATCH="/s"
    ).recipe.cluster.environment == {"HF_HOME": "/s/hf"}


def test_shell_lines_are_left_to_the_shell(small: Small) -> None:
    assert small("cluster.setup=['source ${HOME}/x']").recipe.cluster.setup == ("source ${HOME}/x",)
    assert small("cluster.environment={A: '$${SLURM_JOB_ID}'}").recipe.cluster.environment == {
        "A": "${SLURM_JOB_ID}"
    }


def test_an_unset_variable_is_named(small: Small, recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("shards/train", '"${DATA}/train"'))
    assert message_of(small) == (
        "small.yaml:4: data.train.0.shards: the environment variable DATA is not set; export DATA=… first, "
        "or write ${DATA:-default}"
    )


@pytest.mark.parametrize("text", ["${", "${}", "${A", "${A-b}", "${1}", "${A:-${B}}"])
def test_a_reference_that_is_not_understood(small: Small, text: str) -> None:
    assert "is not valid; write ${NAME} or ${NAME:-default}" in message_of(small, f"name='x{text}'", A="a")


def test_a_wrong_value_from_the_environment_names_the_variable(small: Small) -> None:
    assert "got 'many' (from ${BATCH})" in message_of(small, "data.batch_size=${BATCH}", BATCH="many")
    said = "got 7 (from ${N}); should be a list; write 'evaluate.retrieval=['${N}']'"
    assert said in message_of(small, "evaluate.retrieval=${N}", N="7")


# Paths.


def test_paths_are_kept_as_written_and_resolved_apart(small: Small, tmp_path: Path) -> None:
    loaded = small(
        "data.train.0.shards=['${DATA}/a', '../b/{00..09}.tar', 's3://bucket/c', '~/d']",
        "model.image.weights=${DATA}/w.safetensors",
        DATA="/disk",
    )
    assert loaded.written.data.train[0].shards == ("${DATA}/a", "../b/{00..09}.tar", "s3://bucket/c", "~/d")
    assert loaded.recipe.data.train[0].shards == (
        "/disk/a",
        f"{tmp_path.parent}/b/{{00..09}}.tar",
        "s3://bucket/c",
        f"{os.path.expanduser('~')}/d",
    )
    assert loaded.paths["data.train.0.shards.0"] == "/disk/a"
    assert loaded.paths["data.train.0.shards.2"] == loaded.recipe.data.train[0].shards[2]
    assert loaded.paths["model.image.weights"] == loaded.recipe.model.image.weights == "/disk/w.safetensors"


def test_names_on_a_hub_are_no_paths(small: Small, tmp_path: Path) -> None:
    text = ("model.text.arch=null", "model.text.config={}")
    loaded = small(
        *text, "model.text.hf=org/gpt2", "model.text.weights=pretrained", "data.text.tokenizer=gpt2"
    )
    assert loaded.recipe.model.text.hf == "org/gpt2"
    assert set(loaded.paths) == {"data.train.0.shards"}
    (tmp_path / "org" / "gpt2").mkdir(parents=True)
    loaded = small(*text, "model.text.hf=org/gpt2", "data.text.tokenizer=./gpt2")
    assert loaded.recipe.model.text.hf == loaded.paths["model.text.hf"] == str(tmp_path / "org" / "gpt2")
    assert loaded.paths["data.text.tokenizer"] == str(tmp_path / "gpt2")


# Names of runs, and run folders.


def test_only_result_keys_that_differ_name_a_run(small: Small) -> None:
    assert result_keys(small()) == {
        "data": {"train": [{"shards": "shards/train"}], "batch_size": 12},
        "model": {"image": {"timm": "convnext_atto"}, "text": {"arch": "gpt2", "config": {"n_layer": 1}}},
        "optim": {"lr": 0.001},
        "train": {"duration": "2 epochs"},
    }


@pytest.mark.parametrize(
    "override",
    [
        "seed=0",
        "name=other",
        "data.workers=9",
        "train.micro_batch=12",
        "train.log_every=1 step",
        "train.duration=2.0 epoch",
        "data.batch_size=1.2e1",
        "data.image.mean=openai",
        "data.image.mean=[0.48145466, 0.4578275, 0.40821073]",
        "checkpoint.keep.best={metric: val/t2i_r1}",
        "evaluate.zero_shot=[x]",
        "cluster={nodes: 4, gpus_per_node: 8}",
        "data.train.0.index=/elsewhere",
        "data.bad_samples.limit=0.5",
        "train.non_finite={}",
        "train.channels_last=true",
        "train.compile=true",
        "train.sync_batch_norm=false",
        "checks.allow=[few-steps]",
    ],
)
def test_what_changes_no_name(small: Small, override: str) -> None:
    assert result_keys(small(override)) == result_keys(small())


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "data.batch_size=24",
        "train.ema={}",
        "train.ema={decay: 0.9}",
        "train.non_finite.limit=3",
        "data.train.0.shards=shards/other",
        "data.train.0.weight=1",
        "data.image.flip=true",
        "data.order.window=7",
        "model.image.args={drop_path_rate: 0.1}",
        "train.precision=bf16",
        "train.precision=tf32",
        "train.sync_batch_norm=true",
    ],
)
def test_what_changes_a_name(small: Small, override: str) -> None:
    assert result_keys(small(override)) != result_keys(small())


def test_where_the_average_is_kept_changes_no_name_and_how_it_begins_does(small: Small) -> None:
    average = result_keys(small("train.ema={}"))
    assert result_keys(small("train.ema={device: cpu}")) == average
    assert result_keys(small("train.ema={warmup: true}")) != average


def test_moving_the_data_changes_no_name(small: Small) -> None:
    override = "data.train.0.shards=${DATA}/train"
    here, there = small(override, DATA="/here"), small(override, DATA="/there")
    assert result_keys(here) == result_keys(there)
    assert here.paths != there.paths


def test_an_address_keeps_its_variables_until_it_is_used(small: Small) -> None:
    override = "data.train=[{shards: ['${BUCKET}/{00..09}.tar', 'pipe:cat ${DISK:-/disk}/0.tar'], index: i}]"
    here, there = small(override, BUCKET="s3://here"), small(override, BUCKET="http://there:80")
    assert result_keys(here) == result_keys(there)
    assert here.recipe.data.train[0].shards == ("s3://here/{00..09}.tar", "pipe:cat /disk/0.tar")
    assert from_run(recipe_keys(there), settings_keys(there)) == there.recipe


RICH = (
    "data.train=[{shards: ['${DATA}/a', b], weight: 3, captions_in: lines},"
    " {shards: c, weight: 1, index: i, captions_in: {default: 1, 'syn.json:syn_text': 2}}]",
    "data.image={mean: imagenet, crop_scale: [0.5, 1.0]}",
    "model.image.weights=${DATA}/w",
    "train={duration: 0.5 epochs, ema: {}, micro_batch: 6, log_every: 1 epoch}",
    "checkpoint={every: 90 s, keep: {best: {metric: test/t2i_r1}}}",
    "evaluate={every: 1 epoch, retrieval: ['${DATA}/test'], probe: [{train: '${DATA}/a', test: b}],"
    " zero_shot: [z, {shards: '${DATA}/q', classnames: ./names.txt, templates: openai}]}",
    "cluster={nodes: 2-4, mem: 1.5 GB, environment: {A: 1}, setup: ['echo ${X}'], grace: 60 s}",
)


def test_a_run_folder_gives_the_recipe_back(small: Small) -> None:
    loaded = small(*RICH, DATA="/disk")
    settings = settings_keys(loaded)
    assert settings["paths"]["data.train.0.shards.0"] == "/disk/a"
    assert from_run(recipe_keys(loaded), {**settings, "code": "code-1"}) == loaded.recipe
    assert from_run(result_keys(loaded), settings) == loaded.recipe


def test_a_run_folder_gives_the_recipe_back_through_yaml(small: Small) -> None:
    loaded = small(*RICH, DATA="/disk")
    recipe, settings = (
        yaml.safe_load(yaml.safe_dump(keys)) for keys in (recipe_keys(loaded), settings_keys(loaded))
    )
    assert from_run(recipe, settings) == loaded.recipe


def test_recipe_and_settings_share_no_key(small: Small) -> None:
    def leaves(value: Any, prefix: str = "") -> set[str]:
        if isinstance(value, dict) and value:
            return {leaf for name, entry in value.items() for leaf in leaves(entry, f"{prefix}.{name}")}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return {leaf for place, entry in enumerate(value) for leaf in leaves(entry, f"{prefix}.{place}")}
        return set() if value == [] else {prefix}  # a list of sections without any, in both

    loaded = small(*RICH, DATA="/disk")
    settings = settings_keys(loaded)
    del settings["paths"]
    assert not leaves(recipe_keys(loaded)) & leaves(settings)
    assert set(recipe_keys(loaded)) | set(settings) == set(Recipe.model_fields)


def test_settings_may_move_the_paths(small: Small) -> None:
    loaded = small(*RICH, DATA="/disk")
    settings = settings_keys(loaded)
    settings["paths"]["data.train.0.shards.0"] = "/new/a"
    settings["paths"]["data.text.tokenizer"] = "/run/assets/tokenizer"
    recipe = from_run(recipe_keys(loaded), settings)
    assert recipe.data.train[0].shards[0] == "/new/a"
    assert recipe.data.text.tokenizer == "/run/assets/tokenizer"


def test_a_run_folder_that_was_edited_is_refused(small: Small) -> None:
    loaded = small()
    with pytest.raises(
        UserError, match=r"^recipe\.yaml and settings\.yaml: optim\.lr: got 'x'; should be a number"
    ):
        from_run({**recipe_keys(loaded), "optim": {"lr": "x"}}, settings_keys(loaded))


# A recipe that was loaded, overridden.


def test_an_override_of_a_loaded_recipe(small: Small, tmp_path: Path) -> None:
    loaded = small(*RICH, DATA="/disk")
    assert override(loaded.recipe, []) == loaded.recipe
    changed = override(
        loaded.recipe,
        ["evaluate.zero_shot=['${DATA}/z', z]", "train.ema=null", "data.train.0.weight=2"],
        {"DATA": "/d"},
    )
    assert [own.shards for own in changed.evaluate.zero_shot] == ["/d/z", str(tmp_path / "z")]
    assert changed.train.ema is None
    assert changed.data.train[0].weight == 2
    assert changed.cluster.setup == ("echo ${X}",)
    assert override(changed, ["train.ema.decay=0.5"]).train.ema is not None


def test_what_was_read_before_is_not_expanded_again(small: Small) -> None:
    recipe = small("cluster.environment={A: '$${JOB}'}").recipe
    assert override(recipe, ["seed=3"], {}).cluster.environment == {"A": "${JOB}"}


def test_a_wrong_override_of_a_loaded_recipe(small: Small) -> None:
    with pytest.raises(UserError, match=r"^from the command line: optim\.lrr=3: .*did you mean optim\.lr\?"):
        override(small().recipe, ["optim.lrr=3"])


def test_places_of_keys(small: Small) -> None:
    loaded = small("optim.lr=3")
    assert loaded.place("data.train.0.shards") == "small.yaml:4: data.train.0.shards"
    assert loaded.place("optim.lr") == "from the command line: optim.lr=3"
    assert loaded.place("evaluate.every") == "small.yaml:1: evaluate.every"


# Whatever is written, the answer is a recipe or a message.

NOWHERE = {"XDG_CONFIG_HOME": "/nowhere"}


@given(
    st.sampled_from(
        ["name", "seed", "data", "data.train", "data.train.0.shards", "model.image.args", "optim.betas"]
    ),
    st.text(max_size=30)
    | st.sampled_from(["1e999", "[[]]", "{1: 2}", "&a [*a]", "!!int 3", ".nan", "9" * 400]),
)
def test_no_value_breaks_the_reading(key: str, value: str) -> None:
    with contextlib.suppress(UserError):
        load(RECIPES / "digits.yaml", [f"{key}={value}"], NOWHERE)


@given(st.integers(0, 1200), st.integers(0, 40), st.text("{}[]:,&*!|>'\"%@#- \n\t?~$0e_x", max_size=6))
def test_no_damage_breaks_the_reading(at: int, length: int, text: str) -> None:
    whole = (RECIPES / "digits.yaml").read_text()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "damaged.yaml"
        file.write_text(whole[:at] + text + whole[at + length :])
        with contextlib.suppress(UserError):
            load(file, (), NOWHERE)


KINDS = ("kind_type", "kind_missing", "kind_ambiguous")
JUNK = [
    None,
    True,
    3,
    -1,
    1.5,
    1e400,
    float("nan"),
    10**5000,
    "",
    "x",
    "x" * 200,
    "3 %",
    [],
    [1],
    ["x", {}],
    {},
    {"x": 1},
]


@pytest.mark.parametrize("path", [path for path, _ in walk(Recipe)], ids=".".join)
def test_no_message_is_pydantics_own(recipe_file: Path, path: tuple[str, ...]) -> None:
    """Whatever stands at a key, the type of the error is one that has words here."""
    right = yaml.safe_load(recipe_file.read_text())
    found = set()
    for junk in JUNK:
        value: Any = copy.deepcopy(right)
        here = value
        for part, after in itertools.pairwise(path):
            here = here[0] if part == "*" else here.setdefault(part, {} if after != "*" else [{}])
        here[path[-1]] = junk
        try:
            Recipe.model_validate(value)
        except ValidationError as error:
            found |= {entry["type"] for entry in error.errors()}
    assert found <= {*EXPECTED, "missing", "model_type", "literal_error", "extra_forbidden", *KINDS}


# The shipped recipes, and what reading one costs.


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_recipes_are_right(file: Path) -> None:
    if file.name == "base.yaml":
        pytest.skip("no recipe by itself")
    folders = {name: f"/{name.lower()}" for name in ("DATA", "WEIGHTS", "ASSETS")}
    loaded = load(file, (), {"XDG_CONFIG_HOME": "/nowhere", **folders})
    assert loaded.recipe.name == file.stem


def test_reading_a_recipe_loads_nothing_heavy() -> None:
    code = (
        "import sys, clipcluster.recipe.load, clipcluster.recipe.plan, clipcluster.recipe.reference;"
        f"clipcluster.recipe.load.load({str(RECIPES / 'digits.yaml')!r});"
        "heavy = {'torch', 'timm', 'transformers', 'numpy'};"
        "print(sorted({name.split('.')[0] for name in sys.modules} & heavy))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("lines", "line", "said"),
    [
        (
            "loss:\n  name: siglip\n  label_smoothing: 0.1\n",
            3,
            "loss.label_smoothing: not defined for loss.name",
        ),
        ("\ndata:\n  mixup: {}\n", 3, "data.mixup: task contrastive does not use it; remove it, or set task"),
        ("optim:\n  betas: [0.9, 0.99]\n  cooldown: 5%\n", 3, "optim.cooldown: schedule cosine has none"),
    ],
)
def test_what_a_section_refuses_is_named_at_the_line_of_its_key(
    recipe_file: Path, tmp_path: Path, lines: str, line: int, said: str
) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"{lines}extends: {recipe_file}\n")
    with pytest.raises(UserError) as caught:
        load(child)
    assert f"child.yaml:{line}: {said}" in str(caught.value)


def test_a_section_on_the_command_line_has_its_keys_named(small: Small) -> None:
    given = "optim={lr: 1, lrr: 3}"
    message = message_of(small, given)
    assert message == f"from the command line: {given}: optim.lrr: unknown key; did you mean optim.lr?"


def test_a_list_with_a_wrong_entry_has_one_error(small: Small) -> None:
    message = message_of(small, "task=distill", "distill={stored: {widths: [0]}}")
    assert message.endswith("distill.stored.widths.0: got 0; should be at least 1")


def test_an_entry_of_a_list_that_is_not_there(small: Small) -> None:
    message = message_of(small, "freeze.0.tower=text")
    assert message.endswith(
        "freeze: should be a list of sections with the keys at, tower, trainable, lr_scale, "
        "warmup, batch_norm, norms"
    )
