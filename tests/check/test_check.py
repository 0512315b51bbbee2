"""Both depths of the check, on shards that are really there."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from clipcluster.check import deep, names, plain
from clipcluster.check.deep import examine
from clipcluster.check.plain import Checked, Findings
from clipcluster.data.shards.indexing import index_folder
from clipcluster.data.tokenizer import ByteTokenizer
from clipcluster.errors import UserError
from clipcluster.recipe.load import load, recipe_keys, result_keys, settings_keys
from clipcluster.runs.folder import Run
from clipcluster.runs.names import run_name
from clipcluster.runtime.outcome import Outcome
from tests.check.tiny import write_shard


def test_a_right_recipe(checked: Callable[..., Checked]) -> None:
    found = checked()
    assert (found.errors, found.warnings) == ([], [])
    found.raise_errors()
    assert found.plan is not None
    assert found.recipe is found.loaded.recipe
    assert found.summary == [
        "data: 9 samples in 1 source",  # two of the eleven have no caption and are never drawn
        "steps: 2 per epoch, 20 in total (10 epochs, 80 samples)",
        "warm-up: 0 steps (0.0% of the run)",
        "batch: 4 = 2 ranks x 2 on 1 node",
        "checkpoints: every 15 min; evaluations: at the end",
        "learning rate: 0.001",
        "allowed (text-from-scratch): model.text starts from scratch, and the training data have 9 captioned "
        "samples, less than 1,000,000: it converges slowly; give model.text.weights",
    ]


def test_micro_batches_are_said(checked: Callable[..., Checked]) -> None:
    found = checked("data.batch_size=8", "train.micro_batch=2", "checkpoint.every=auto")
    assert found.summary[3] == "batch: 8 = 2 ranks x 4 on 1 node, in 2 micro-batches of 2"
    assert found.summary[4].startswith("checkpoints: as often as measured to be best; evaluations: ")


def test_captions_all_counts_pairs(checked: Callable[..., Checked]) -> None:
    found = checked("data.text.captions=all", "checkpoint.every=1 epoch", "evaluate.every=2 epochs")
    assert found.summary[0] == "data: 18 pairs in 1 source"
    assert found.summary[1] == "steps: 4 per epoch, 40 in total (10 epochs, 160 pairs)"
    assert found.summary[4] == "checkpoints: every 4 steps; evaluations: every 8 steps and at the end"


@pytest.mark.parametrize(
    ("overrides", "samples"),
    [
        (["data.train.0.repeat=3"], "27 samples"),
        (["data.train.0.repeat_classes={odd: 2}"], "13 samples"),
        (["data.train.0.repeat_classes={1: 2.5, even: 0}"], "10 samples"),
        (["data.train.0.repeat_classes.even=0.5", "data.train.0.repeat=2"], "10 samples"),
        (["data.train.0.repeat_classes={odd: 2}", "data.text.captions=all"], "26 pairs"),
    ],
)
def test_repeats_are_counted(checked: Callable[..., Checked], overrides: list[str], samples: str) -> None:
    found = checked(*overrides)
    assert found.errors == []
    assert found.summary[0] == f"data: {samples} in 1 source, repeats included"
    assert found.plan is not None
    assert found.plan.steps_per_epoch == int(samples.split()[0]) // 4


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["data.train.0.repeat_classes={ood: 2}"],
            "no class in classnames.txt is called 'ood'; did you mean 'odd'?",
        ),
        (["data.train.0.repeat_classes={2: 2}"], "there is no class 2; the classes are 0 to 1"),
        (["data.train.0.repeat=0.37"], "The nearest possible repeats are 0.37037037"),
        (
            ["data.train.0.repeat=0"],
            "data.train.0 train: no sample with a caption and a repeat above zero. Look at",
        ),
        (["data.train.0.shards=data/trian"], "data.train.0.shards"),
        (["data.train.0.shards=data/trian"], "no such folder"),
        (["data.batch_size=5"], "does not divide by 2 ranks; set it to 4 or 6"),
        (["data.batch_size=10"], "the training data hold 9 samples, less than one batch of 10"),
        (
            ["data.batch_size=10", "data.epoch_samples=20"],
            "a pass through the training data, repeats counted, is 9 samples",
        ),
        (
            ["data.train=[{shards: data/train, weight: 0.333331}, {shards: data/test, weight: 1}]"],
            "The nearest possible weights are",
        ),
        (["optim.warmup=10 epochs"], "takes the whole run of 20 steps"),
        (
            ["freeze=[{tower: text, trainable: last 1}]"],
            "model.text has no weights, so they would stay random",
        ),
        (["freeze=[{tower: text, trainable: all}]"], "changes nothing: the tower trains as without it"),
        (["model.image.weights=data/trian"], "data/trian does not exist; did you mean"),
        (["data.text.tokenizer=./nowhere"], "nowhere does not exist"),
        (["evaluate.retrieval=[data/none]"], "evaluate.retrieval=[data/none]: "),
        (
            ["checkpoint.keep.best={metric: test/t2i_r2}"],
            "checkpoint.keep.best.metric: nothing measures 'test/t2i_r2'; did you mean test/t2i_r5?",
        ),
        (["checkpoint.keep.best={metric: loss}", "evaluate={}"], "measured: nothing (see evaluate)"),
    ],
)
def test_what_is_wrong_with_a_run(checked: Callable[..., Checked], overrides: list[str], said: str) -> None:
    found = checked(*overrides)
    assert said in "\n".join(found.errors)
    with pytest.raises(UserError):
        found.raise_errors()


def test_sets_of_both_kinds_have_names_of_their_own(checked: Callable[..., Checked], folder: Path) -> None:
    shutil.copytree(folder / "data", folder / "others")
    best = "checkpoint.keep.best={metric: others-test/zero_shot_top1}"
    assert checked("evaluate.zero_shot=[others/test]", best).errors == []
    assert "nothing measures 'others-test/zero_shot_top1'" in checked(best).errors[0]


def test_every_count_of_a_range_of_nodes_is_tried(checked: Callable[..., Checked]) -> None:
    found = checked("cluster.nodes=1-3")  # three nodes of two ranks do not divide a batch of 4, two do
    assert found.errors == []
    assert found.warnings == [
        "of 3 nodes 2 are used and 1 idle: data.batch_size 4 does not divide by 6 ranks",
    ]
    (message,) = checked("cluster.nodes=3-4").errors
    assert message.startswith("data.batch_size 4 does not divide by 6 ranks")


def test_one_of_a_thing_is_said_so(checked: Callable[..., Checked]) -> None:
    found = checked(
        "train.duration=1 epoch", "evaluate.every=1 step", "checkpoint.every=1 step", "data.batch_size=8"
    )
    assert found.summary[1] == "steps: 1 per epoch, 1 in total (1 epoch, 8 samples)"
    assert found.summary[4] == "checkpoints: every 1 step; evaluations: every 1 step and at the end"


def test_every_error_is_told(checked: Callable[..., Checked]) -> None:
    found = checked("data.train.0.shards=data/none", "evaluate.zero_shot=[data/nix]", "model.image.weights=w")
    assert len(found.errors) == 3
    assert found.plan is None
    assert found.summary == []
    with pytest.raises(UserError, match=r"^3 errors\n"):
        found.raise_errors()


def test_a_known_metric_keeps_the_best(checked: Callable[..., Checked]) -> None:
    for metric in ("test/t2i_r1", "test/paired_i2t_mean_rank", "test/zero_shot_top1"):
        assert checked(f"checkpoint.keep.best={{metric: {metric}}}").errors == []


def test_shards_without_an_index_name_the_command(checked: Callable[..., Checked], folder: Path) -> None:
    write_shard(folder / "data/new/00000.tar", 5)
    (message,) = checked("data.train.0.shards=data/new").errors
    assert message.startswith("from the command line: data.train.0.shards=data/new: ")
    assert f"clipcluster shards index {folder}/data/new" in message
    (folder / "data/empty").mkdir()
    (message,) = checked("data.train.0.shards=data/empty").errors
    assert "data/empty" in message


CLASSIFIED = (
    *("task=classify", "model={image: {timm: test_convnext}, text: null, embed_dim: 512}"),
    "evaluate={retrieval: [], zero_shot: [], classification: [data/test]}",
)


def test_a_classifier_needs_classes_and_no_captions(checked: Callable[..., Checked], folder: Path) -> None:
    best = "checkpoint.keep.best={metric: test/top1}"
    assert checked(*CLASSIFIED, best).errors == []
    assert "data: 9 samples in 1 source" in checked("data.text.captions=first").summary
    assert "data: 11 samples in 1 source" in checked(*CLASSIFIED).summary  # those without a caption too
    (error,) = checked(*CLASSIFIED, "checkpoint.keep.best={metric: test/raw_top1}").errors
    assert "nothing measures 'test/raw_top1'" in error
    assert checked(*CLASSIFIED, best.replace("top1", "raw_top1"), "train.ema={}").errors == []
    trained, measured = checked(*CLASSIFIED, "model.classes=1").errors
    assert "has a sample of class 1, and the model 1 classes" in trained
    assert "a sample has class 1, and the classes are 0 to 0" in measured
    write_shard(folder / "data/other/00000.tar", 5, classes=3)
    index_folder(folder / "data/other")
    (error,) = checked(*CLASSIFIED, "evaluate.classification=[data/other]").errors
    assert error.endswith("a sample has class 2, and the classes are 0 to 1")
    shutil.copy(folder / "data/classnames.txt", folder / "data/train")
    (folder / "data/test/classnames.txt").write_text("even\nuneven\n")
    (error,) = checked(*CLASSIFIED).errors
    assert "class 1 is 'uneven' there and 'odd' in data.train.0" in error
    (folder / "data/train/classnames.txt").unlink()
    (folder / "data/classnames.txt").unlink()
    assert "model.classes: no classnames.txt beside" in checked(*CLASSIFIED).errors[0]


def test_zero_shot_needs_names_and_templates(checked: Callable[..., Checked], folder: Path) -> None:
    (folder / "data/classnames.txt").unlink()
    (folder / "data/zeroshot_classification_templates.txt").write_text("a number\n")
    errors = checked().errors
    assert errors[0].startswith("tiny.yaml:15: evaluate.zero_shot.0: zero-shot needs classnames.txt")
    assert errors[1].endswith("needs {c}")
    (folder / "data/zeroshot_classification_templates.txt").write_text("a {c} number\n")
    (folder / "data/classnames.txt").write_text("even\n")
    (error,) = checked().errors
    assert error.endswith("evaluate.zero_shot.0: a sample has class 1, and the classes are 0 to 0")
    (error,) = checked("evaluate.zero_shot=[{shards: data/test, classnames: imagenet-1k}]").errors
    assert "imagenet-1k names 1,000 classes, and the classnames.txt of the shards 1;" in error
    write_shard(folder / "data/none/00000.tar", 5, classes=0)
    index_folder(folder / "data/none")
    (error,) = checked("evaluate={retrieval: [], zero_shot: [data/none]}").errors
    assert error.endswith(": no sample has a class (KEY.cls)")
    (folder / "data/classnames.txt").write_text("even\n\nodd\n")
    assert "classnames.txt: line 2 is empty, and would be the name of class 1" in checked().errors[0]


def test_zero_shot_takes_names_and_templates_of_the_recipe(
    checked: Callable[..., Checked], folder: Path
) -> None:
    (folder / "data/classnames.txt").unlink()
    (folder / "data/zeroshot_classification_templates.txt").unlink()
    (folder / "names.txt").write_text("偶数\n奇数\n", encoding="utf-8")
    (folder / "lines.txt").write_text("{c}\n")
    given = "shards: data/test, classnames: names.txt, templates: lines.txt"
    found = checked(f"evaluate.zero_shot=[{{{given}}}]")
    assert found.errors == []
    assert found.loaded.paths["evaluate.zero_shot.0.classnames"] == str(folder / "names.txt")
    best = "checkpoint.keep.best={metric: cn/zero_shot_mean_per_class}"
    assert checked(f"evaluate.zero_shot=[{{{given}, name: cn}}]", best).errors == []
    assert checked(f"evaluate.zero_shot=[{{{given}, name: cn}}]").recipe.evaluate.zero_shot[0].name == "cn"
    other = "{shards: data/test, classnames: imagenet-1k, templates: lines.txt}"
    (error,) = checked(f"evaluate.zero_shot=[{{{given}}}, {other}]").errors
    assert "evaluate.zero_shot: two sets are called test" in error
    (folder / "names.txt").write_text("even\n")
    (error,) = checked(f"evaluate.zero_shot=[{{{given}}}]").errors
    assert error.endswith("a sample has class 1, and the classes are 0 to 0")
    (error,) = checked("evaluate.zero_shot=[{shards: data/test, classnames: x, templates: lines.txt}]").errors
    assert "evaluate.zero_shot.0: x: no such file of class names; give a file with one per line, or" in error


def test_a_probe_needs_two_sets_with_classes(checked: Callable[..., Checked], folder: Path) -> None:
    probe = "evaluate.probe=[{train: data/train, test: data/test}]"
    best = "checkpoint.keep.best={metric: test/linear_top1}"
    assert checked(probe, best).errors == []
    write_shard(folder / "data/none/00000.tar", 5, classes=0)
    index_folder(folder / "data/none")
    (error,) = checked("evaluate.probe=[{train: data/none, test: data/test}]").errors
    assert error.endswith("evaluate.probe.0: no sample has a class (KEY.cls)")
    with pytest.raises(UserError, match=r"evaluate\.probe\.0.*the key .*train is missing"):
        checked("evaluate.probe=[{test: data/test}]")


def test_warnings_do_not_stop(checked: Callable[..., Checked]) -> None:
    found = checked("optim.warmup=5 epochs", "data.workers=9")
    assert found.errors == []
    assert "50.0% of the run's 20 steps" in found.warnings[0]
    assert found.warnings[1].endswith("raise cluster.cpus_per_task to at least 9, or lower data.workers")
    assert "does not run on the CPU" in checked("train.sync_batch_norm=true").errors[0]


def test_what_only_adamw_reads_is_said_of_another_optimizer(
    checked: Callable[..., Checked],
) -> None:
    found = checked("optim.name=lamb", "optim.betas=[0.9, 0.98]")
    (warning,) = [text for text in found.warnings if "adamw" in text]
    assert warning == (
        "from the command line: optim.betas=[0.9, 0.98]: it is adamw's, and lamb does not read it; remove "
        "it, or give args: {betas: …}"
    )
    assert not any("adamw" in text for text in checked("optim.name=lamb").warnings)


def test_what_is_said_of_weights_that_are_not_there(checked: Callable[..., Checked], folder: Path) -> None:
    without = checked("model.weights_from=raw", "model.missing=[a]", "model.image.missing=[b]").warnings
    assert ["has no effect without" in warning for warning in without] == [True] * 3
    for warning, key in zip(without, ("weights_from", "image.missing", "missing"), strict=True):
        assert warning.startswith(f"from the command line: model.{key}=")
    save_file(timm.create_model("test_convnext", num_classes=0).state_dict(), folder / "tower.safetensors")
    tower = ("model.image.weights=tower.safetensors", "model.image.missing=[b]", "model.weights_from=raw")
    assert checked(*tower).warnings == []
    loaded = load("tiny.yaml", ())
    run = Run.create(folder / "run", recipe_keys(loaded), settings_keys(loaded))
    assert checked("model.weights=run").warnings == []
    (run.path / "checkpoints/step-00000001").mkdir(parents=True)
    (warning,) = checked("model.weights=run").warnings
    assert "run has not finished: once it has a newer checkpoint, a resume finds other weights" in warning
    run.claim("test", host="here", still_running=lambda job: False).end("finished", Outcome.FINISHED, "")
    assert checked("model.weights=run").warnings == []
    (error,) = checked(f"model.weights={300 * 'w'}").errors  # which no file system can look for
    assert "does not exist" in error
    for key in ("optim.text.lr=1e-4", "optim.logit_scale.lr=1e-4"):
        with pytest.raises(UserError, match="task classify does not use it"):
            checked(*CLASSIFIED, key)


def test_a_recipe_that_cannot_be_read_raises(checked: Callable[..., Checked]) -> None:
    with pytest.raises(UserError, match=r"did you mean optim\.lr\?"):
        checked("optim.lrr=3")


# Names that only timm or the hub knows.


def test_a_misspelled_tower_is_found_by_the_plain_check(checked: Callable[..., Checked]) -> None:
    (error,) = checked("model.image.timm=test_convnex").errors
    assert error.startswith("from the command line: model.image.timm=test_convnex: timm ")
    assert error.endswith("has no model 'test_convnex'; did you mean test_convnext?")
    for known in ("resnet50.a1_in1k", "convnext_tiny_in22ft1k"):  # a tag; a name of before
        assert checked(f"model.image.timm={known}").errors == []


def test_a_misspelled_architecture_is_found_by_the_plain_check(checked: Callable[..., Checked]) -> None:
    (error,) = checked("model.text={arch: gpt3}").errors
    assert error.startswith("from the command line: model.text={arch: gpt3}: model.text.arch: transformers ")
    assert (
        "has no model type 'gpt3' (text towers are gpt2, bert, roberta, modernbert and others); did" in error
    )
    assert checked("model.text={arch: modernbert}").errors == []


def test_without_timms_names_the_plain_check_says_what_it_leaves_out(
    checked: Callable[..., Checked], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    found = checked("model.image.timm=test_convnex")
    assert found.errors == []
    assert found.unchecked == [
        "model.image.timm 'test_convnex': the first check with --deep stores the names of timm",
        "model.text.arch 'gpt2': the first check with --deep stores the names of transformers",
    ]
    names.store_names()
    assert len(checked("model.image.timm=test_convnex").errors) == 1
    (file,) = (tmp_path / "none/clipcluster/names").glob("*-models.json")
    for damaged in ("", "[1", "{}", "[1]"):
        file.write_text(damaged)
        assert checked().unchecked[0].startswith("model.image.timm")
    names.store_names()
    assert checked("model.image.timm=test_vit").unchecked == []


def test_an_optimizer_is_known_by_the_stored_names(
    checked: Callable[..., Checked], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert checked("optim.name=lamb").errors == []
    for name, said in {
        "lambb": "did you mean lamb?",
        "kron": "has no optimizer 'kron' that can be used",
        "adahessian": "; usable: adabelief, ",
    }.items():
        (error,) = checked(f"optim.name={name}").errors
        assert error.startswith(f"from the command line: optim.name={name}: timm ")
        assert said in error
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    assert any(text.startswith("optim.name 'lamb'") for text in checked("optim.name=lamb").unchecked)
    assert not any(text.startswith("optim.name") for text in checked().unchecked)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hugging Face's cache with one tokenizer and one configuration."""
    cache = tmp_path / "hub"
    for name in ("tokenizer.json", "config.json"):
        file = cache / "models--org--gpt2" / "snapshots" / "0a1b" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def test_names_on_the_hub_are_looked_for_in_its_cache(
    checked: Callable[..., Checked], hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    known = ("model.text={hf: org/gpt2}", "data.text.tokenizer=org/gpt2")
    assert checked(*known).unchecked == []
    unknown = ("model.text={hf: org/gpt}", "data.text.tokenizer=org/gpt")
    found = checked(*unknown)
    assert found.errors == []
    reason = (
        "'org/gpt' is not a folder and not in Hugging Face's cache: the hub is asked at submission; did you "
        "mean org/gpt2, which is in the cache?"
    )
    assert found.unchecked == [f"model.text.hf {reason}", f"data.text.tokenizer {reason}"]
    vision = ("model.image.timm=null", "model.image.args=null")
    assert checked(*vision, "model.image.hf=org/gpt2").unchecked == []
    assert checked(*vision, "model.image.hf=org/gpt").unchecked == [f"model.image.hf {reason}"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert checked(*known).errors == []
    errors = checked(*unknown).errors
    assert len(errors) == 2
    assert "HF_HUB_OFFLINE is set; did you mean org/gpt2, which is in the cache?" in errors[1]


def test_what_an_earlier_submission_fetched_is_there(
    folder: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    override = ["data.text.tokenizer=org/other"]
    (error,) = plain.check("tiny.yaml", override, runs=folder / "runs").errors
    assert "'org/other' is not a folder" in error
    loaded = load("tiny.yaml", override)
    (folder / "runs" / run_name("tiny", result_keys(loaded)) / "assets" / "org--other").mkdir(parents=True)
    assert plain.check("tiny.yaml", override, runs=folder / "runs").errors == []


def test_a_file_may_be_a_vocabulary(checked: Callable[..., Checked], tmp_path: Path) -> None:
    (tmp_path / "bpe.txt.gz").touch()
    found = checked(f"data.text.tokenizer={tmp_path / 'bpe.txt.gz'}")
    assert not found.errors
    assert not [said for said in found.unchecked if "tokenizer" in said]


def test_a_folder_without_a_tokenizer(checked: Callable[..., Checked]) -> None:
    (error,) = checked("data.text.tokenizer=./data").errors
    assert "/data has none of tokenizer.json, tokenizer_config.json" in error


def test_the_plain_check_loads_no_torch(folder: Path) -> None:
    code = (
        "import sys; from clipcluster.check import plain; assert not plain.check('tiny.yaml').errors;"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'timm', 'transformers'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    assert run.stdout.strip() == "[]"


# The deep check; torch, timm and transformers take seconds to load, so one process serves several questions.


def examined(*overrides: str, world_size: int = 2) -> Findings:
    return examine(plain.check("tiny.yaml", overrides).recipe, world_size, None)


def test_a_right_recipe_in_a_process_of_its_own(folder: Path) -> None:
    found = deep.check(plain.check("tiny.yaml").recipe, world_size=2)
    assert (found.errors, found.warnings) == ([], [])
    text = "\n".join(found.summary)
    assert "image tower: test_convnext" in text
    assert re.search("text tower: gpt2, [0-9,]+ parameters, pool last\n", text)
    assert "data.train.0: 00000.tar 0000, 7 x 9 pixels, 'sample 0'" in text
    assert "evaluate.zero_shot.0: 00000.tar 0000, 7 x 9 pixels" in text


def test_a_process_that_fails_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "broken").mkdir()
    (folder / "broken" / "pydantic.py").write_text("raise ImportError('no such thing here')\n")
    monkeypatch.setenv("PYTHONPATH", str(folder / "broken"))
    (message,) = deep.check(plain.check("tiny.yaml").recipe).errors
    assert "the deep check itself failed" in message
    assert "no such thing here" in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.image.args={no_such_argument: 1}", "no_such_argument"),
        ("model.image.args={depths: [1, 1], dims: [8, 8]}", "model.image"),
        ("model.image.weights=tiny.yaml", "tiny.yaml"),
        ("optim.no_decay=[nothing]", "fits no parameter"),
        ("optim={name: lamb, lr: 1, args: {beta: 1}}", "timm cannot make lamb"),
    ],
)
def test_what_only_the_deep_check_finds(folder: Path, override: str, said: str) -> None:
    assert plain.check("tiny.yaml", [override]).errors == []
    assert said in "\n".join(examined(override).errors)


def test_what_freezes_is_counted_and_its_layers_are_named(folder: Path) -> None:
    tower = timm.create_model("test_convnext", num_classes=0)
    save_file(tower.state_dict(), folder / "tower.safetensors")
    weights = "model.image.weights=tower.safetensors"
    frozen = "freeze=[{tower: image, trainable: none}, {tower: image, trainable: last 2, at: 1 epochs}]"
    (error,) = plain.check("tiny.yaml", [frozen]).errors
    assert "freeze.0 (image: none from step 0) freezes layers that were never trained" in error
    checked = plain.check("tiny.yaml", [frozen, weights])
    assert "freeze: image: none from step 0" in checked.summary
    found = examined(frozen, weights)
    size = sum(parameter.numel() for parameter in tower.parameters())
    assert found.errors == []
    stages = [line for line in found.summary if line.startswith("the stage from step")]
    assert [f"(image 0 of {size:,})" in line for line in stages] == [True, False]
    (error,) = examined(frozen, weights, "freeze.1.trainable=last 99").errors
    assert error.startswith("freeze.1 (image: last 99 from step ")
    assert "the image tower has" in error
    assert "layers: stem, trunk.stages.0" in error


def test_what_pretrained_weights_expect_otherwise_is_said(folder: Path) -> None:
    """Pixels, tokens, and a scale above the bound: each would silently make another model of them."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 400, "max_position_embeddings": 16, "eos_token_id": ByteTokenizer.eos_id}
    vision = sizes | {"image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.logit_scale.data.fill_(math.log(200))
    model.save_pretrained(folder / "clip")
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "clip/preprocessor_config.json").write_text(json.dumps(pixels))
    dual = "model={dual: {hf: clip, weights: pretrained}, image: null, text: null, embed_dim: 512}"
    found = examined(dual)
    assert found.errors == []
    for said in (
        r"data\.image: .*clip was trained with pixels of mean \[0\.5, 0\.5, 0\.5\] and std",
        r"data\.text\.tokenizer: it has 259 tokens, and the text tower's weights are for 400",
        r"model\.logit_scale\.max: the weights' scale is 200, and the first step lowers it to 100",
    ):
        assert any(re.match(said, warning) for warning in found.warnings), (said, found.warnings)
    pixels_alike = "data.image={size: 32, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}"
    found = examined(dual, pixels_alike, "model.logit_scale={max: null}")
    assert [warning[:19] for warning in found.warnings] == ["data.text.tokenizer"]
    moving = "freeze=[{at: 1 epochs, tower: text, trainable: last 1, batch_norm: moving}]"
    warnings = examined(dual, pixels_alike, moving).warnings
    assert any(warning.startswith("freeze.0.batch_norm: ") for warning in warnings)


def test_weights_of_a_run_with_other_pixels_are_said(folder: Path) -> None:
    """ImageNet's recipes and those of captions differ in them."""
    imagenet = ("data.image.mean=imagenet", "data.image.std=imagenet")
    loaded = load("tiny.yaml", imagenet)
    run = Run.create(folder / "run", recipe_keys(loaded), settings_keys(loaded))
    (run.path / "checkpoints/step-00000001").mkdir(parents=True)
    file = run.path / "checkpoints/step-00000001/model.safetensors"
    save_file(timm.create_model("test_convnext", num_classes=0).state_dict(), file)
    found = examined(f"model.image.weights={file}")
    assert found.errors == []
    said = f"data.image: {file} was trained with pixels of mean [0.485, 0.456, 0.406] and std [0.229, 0.224, "
    assert any(warning.startswith(said) for warning in found.warnings)
    alike = examined(f"model.image.weights={file}", *imagenet)
    assert not any("pixels" in warning for warning in alike.warnings)


def test_an_image_tower_that_gives_no_vector_is_found(folder: Path) -> None:
    (error,) = examined("model.image.args={global_pool: ''}").errors  # maps of features
    assert "for one, and not one vector of" in error
    (error,) = examined("model.image.timm=test_vit", "model.image.args={patch_size: 24}").errors
    assert "test_vit cannot take images of 32 pixels (data.image.size)" in error


def test_what_only_a_step_shows_is_found(folder: Path) -> None:
    xlnet = "model.text={arch: xlnet, config: {n_layer: 1, n_head: 2, d_model: 16, d_inner: 16}, pool: last}"
    (error,) = examined(xlnet).errors
    assert "text.transformer.mask_emb" in error
    assert "several ranks" in error
    assert examined("data.batch_size=8", "train.micro_batch=2", xlnet).errors == [error]  # in micro-batches
    assert examined("data.batch_size=8", "train.micro_batch=2").errors == []
    alone = examined(xlnet, world_size=1)
    assert alone.errors == []
    assert "text.transformer.mask_emb" in alone.warnings[0]


def test_batch_norms_over_ranks_are_warned_of(folder: Path) -> None:
    found = examined("model.image.timm=test_resnet", "train.precision=bf16")
    assert found.errors == []
    assert "batch norms, whose statistics are over 2 samples, a rank's micro-batch" in found.warnings[0]
    assert "train.batch_norm_group 2" in found.warnings[0]
    assert "batch norms of test_resnet: kept in fp32 under bf16" in found.summary
    assert examined("model.image.timm=test_resnet", world_size=1).warnings == []
    grouped = ("model.image.timm=test_resnet", "train.batch_norm_group=2")
    assert examined(*grouped, "train.activation_checkpointing=true").warnings == []
    together = examined("model.image.timm=test_resnet", "train.sync_batch_norm=true")
    assert together.warnings == []  # over the whole batch, however many ranks
    idle = examined(
        "train.batch_norm_group=2",
        "freeze=[{at: 1 epochs, tower: text, trainable: last 1, batch_norm: moving}]",
    )
    assert idle.errors == []
    assert [warning.partition(" has no")[0] for warning in idle.warnings] == [
        "train.batch_norm_group: test_convnext",
        "freeze.0.batch_norm: gpt2",
    ]


def test_captions_longer_than_the_context_are_counted(folder: Path) -> None:
    said = (
        "data.train.0: of 18 captions 0% have more than the 16 tokens of data.text.context_length (median 10"
    )
    assert said in "\n".join(examined().summary)
    short = ("data.text.context_length=8", "data.text.tokenizer=bytes")
    (warning,) = examined(*short).warnings
    assert (
        "of 18 captions 100% have more than the 8 tokens of data.text.context_length (median 10, l" in warning
    )
    assert warning.endswith("and are truncated (if intended: checks.allow: [long-captions])")
    found = examined(*short, "checks.allow=[long-captions]")
    assert found.warnings == []
    assert any(line.startswith("allowed (long-captions): data.train.0: of 18") for line in found.summary)


def test_a_sample_that_cannot_be_decoded_is_passed_over(folder: Path) -> None:
    write_shard(folder / "data/train/00000.tar", 6, broken=2)
    index_folder(folder / "data/train")
    found = examined()
    assert found.errors == []
    assert "00000.tar 0000" in found.warnings[0]
    assert "data.train.0: 00000.tar 0002" in "\n".join(found.summary)
    write_shard(folder / "data/only/00000.tar", 3, broken=3)
    index_folder(folder / "data/only")
    (message,) = examined("data.train.0.shards=data/only", "data.batch_size=2").errors
    assert "none of the first 3 samples can be decoded" in message


def test_a_shard_that_changed_or_has_no_index_is_named(folder: Path) -> None:
    shard, index = folder / "data/train/00001.tar", folder / "data/train/00001.tar.idx"
    hidden = index.rename(folder / "hidden")
    (message,) = examined().errors
    assert f"the index of {shard} is damaged: " in message
    assert f"No such file or directory: '{index}'" in message
    hidden.rename(index)
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    os.utime(shard, (1, 1))
    (message,) = examined().errors
    assert "00001.tar changed since it was indexed" in message
    assert "clipcluster shards index" in message


def grow(path: Path, size: int) -> None:
    """A member of so many bytes more in a shard."""
    with tarfile.open(path, "a") as tar:
        entry = tarfile.TarInfo("more.bin")
        entry.size = size
        tar.addfile(entry, io.BytesIO(bytes(size)))


def test_sources_behind_a_server(
    folder: Path,
    web_server: Callable[..., Any],
    checked: Callable[..., Checked],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLIPCLUSTER_CACHE", str(folder / "cache"))
    server = web_server(folder / "data")
    remote = [f"data.train.0.shards={server.address}/train"]
    remote += [f"evaluate.{kind}=[{server.address}/test]" for kind in ("retrieval", "zero_shot")]
    found = checked(*remote)
    assert (found.errors, found.warnings, found.summary) == ([], [], checked().summary)
    assert not [path for _, path, *_ in server.log if path.endswith((".tar", ".idx"))]
    small = [*remote, "data.cache.size=1 MB"]
    for name in ("00000", "00001"):
        grow(folder / f"data/train/{name}.tar", 600_000)
    index_folder(folder / "data/train")
    (warning,) = checked(*small).warnings
    assert warning.startswith("data.cache.size 1 MB is less than the 1,2")
    grow(folder / "data/train/00001.tar", 600_000)
    index_folder(folder / "data/train")
    (error,) = checked(*small).errors
    assert "its largest shard has 1,2" in error
    assert "the cache holds 1,048,576; set data.cache.size" in error


def test_a_server_that_is_not_there(checked: Callable[..., Checked]) -> None:
    began = time.monotonic()
    (error,) = checked("data.train.0.shards=http://127.0.0.1:9/train").errors
    assert "the index cannot be read: [Errno 111] Connection refused (tried 3 times)" in error
    assert time.monotonic() - began < 10


def test_plain_checks_of_local_shards_load_nothing_for_remote_ones(folder: Path) -> None:
    code = (
        "import sys; from clipcluster.check import plain; plain.check('tiny.yaml');"
        "loaded = {'fsspec', 'urllib.request', 'clipcluster.data.storage.cache'} & set(sys.modules);"
        "sys.exit(' '.join(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.stderr.strip() == ""
