"""The checks of recipes that distill."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import CLIPConfig, CLIPModel

from clipcluster.check.deep import examine
from clipcluster.check.plain import Checked, check
from clipcluster.data.tokenizer import ByteTokenizer
from clipcluster.errors import UserError
from clipcluster.recipe.load import load, recipe_keys, settings_keys
from clipcluster.runs.folder import Run
from jobs.submit.assets import hub_names
from tests.reinforced_shards import WIDTH, members, write
from tests.shard_writer import ShardWriter

RECIPE = """
name: student
task: distill
distill: {distill}
data:
  train: [{{shards: {folder}/shards}}]
  batch_size: 4
  workers: 0
  image: {{size: 32}}
  text: {{tokenizer: bytes, context_length: 40}}
model:
  image: {{timm: test_vit}}
  text: {{arch: gpt2, config: {{n_layer: 1, n_head: 2, n_embd: 32}}}}
  embed_dim: 16
optim: {{lr: 1e-3, warmup: 1 steps}}
train: {{duration: 20 steps}}
cluster: {{gpus_per_node: 0, cpus_per_task: 1}}
"""
STORED = f"{{stored: {{widths: [{WIDTH}, {WIDTH}]}}}}"
TEACHER = (
    "{teachers: [{model: {dual: {hf: some/teacher, weights: pretrained}}, text: {tokenizer: another/one}}]}"
)


@pytest.fixture
def checked(tmp_path: Path) -> Callable[..., Checked]:
    write(tmp_path / "shards", 8)

    def run(distill: str = STORED, *overrides: str) -> Checked:
        (tmp_path / "r.yaml").write_text(RECIPE.format(folder=tmp_path, distill=distill))
        return check(tmp_path / "r.yaml", overrides)

    return run


def test_stored_embeddings_pass_both_checks(checked: Callable[..., Checked]) -> None:
    plain = checked()
    assert plain.errors == []
    deep = examine(plain.recipe, 1, None)
    assert deep.errors == []
    other = examine(checked(STORED.replace(f"{WIDTH}, {WIDTH}", "768, 768")).recipe, 1, None)
    assert "image_emb has the shape (4, 12), not (…, 1536)" in other.errors[0]


def test_shards_without_the_members_are_named(checked: Callable[..., Checked], tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "plain") as writer:
        for number in range(8):
            own = members(number)
            writer.add_members(f"{number}", {name: own[name] for name in ("png", "txt", "json")})
    (error,) = checked(STORED, f"data.train.0.shards={tmp_path}/plain").errors
    for words in ("data.train.0", "npz or pth.gz, paug.json, syn.json", "convert datacompdr"):
        assert words in error


def test_a_teacher_that_is_no_run(checked: Callable[..., Checked], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (error,) = checked(f"{{teachers: [{{run: {tmp_path}/folder}}]}}").errors
    assert "distill.teachers.0.run: " in error
    assert "folder is neither the folder of a run nor of one of its checkpoints (RUN/checkpoints" in error
    loaded = load(tmp_path / "r.yaml", ["task=contrastive", "distill=null"])
    Run.create(tmp_path / "teacher", recipe_keys(loaded), settings_keys(loaded))
    teacher = f"{{teachers: [{{run: {tmp_path}/teacher}}]}}"
    (error,) = checked(teacher).errors
    assert "teacher has no checkpoint yet; wait for its first" in error
    (tmp_path / "teacher/checkpoints/step-00000001").mkdir()
    for run in (teacher, teacher.replace("/teacher", "/teacher/checkpoints/step-00000001")):
        assert checked(run).errors == []
    classify = ["task=classify", "distill=null", "model.text=null", "model.embed_dim=512", "model.classes=2"]
    loaded = load(tmp_path / "r.yaml", classify)
    Run.create(tmp_path / "classifier", recipe_keys(loaded), settings_keys(loaded))
    (tmp_path / "classifier/checkpoints/step-00000001").mkdir()
    (error,) = checked(teacher.replace("/teacher", "/classifier")).errors
    assert "classifier is of task classify; a teacher needs images and captions" in error
    (tmp_path / "classifier/recipe.yaml").write_text("[")
    (error,) = checked(teacher.replace("/teacher", "/classifier")).errors
    assert "recipe.yaml" in error


def test_several_ranks_need_a_loss_over_the_batch(checked: Callable[..., Checked]) -> None:
    """The features alone leave the logit scale without a gradient; of images alone, the text tower too."""
    alone = STORED.replace("{stored", "{weight: 0, contrastive: 0, feature_cosine: 1, stored")
    several = "cluster.tasks_per_node=2"
    assert checked(alone).errors == []
    (error,) = checked(alone, several).errors
    assert "the loss does not depend on the text tower and the logit scale, and 2 ranks cannot" in error
    assert "r.yaml:4: distill.weight: " in error
    (error,) = checked(alone.replace("feature_cosine", "feature_mse"), several).errors
    assert "the loss does not depend on the logit scale" in error
    (error,) = examine(checked(alone).recipe, 2, None).errors  # which it had to be asked for
    assert "parameters without a gradient: " in error
    assert "logit_scale" in error
    assert checked(alone.replace("contrastive: 0, ", ""), several).errors == []


@pytest.mark.parametrize(
    ("distill", "overrides", "said"),
    [
        ("null", (), "task distill needs the section distill"),
        (STORED, ("task=contrastive",), "task contrastive does not use it"),
        (
            STORED,
            ("data.train.0.captions_in={default: 0.5, 'json:alt': 0.5}",),
            "json:alt: the stored teachers saw the images' own captions and the synthetic ones alone",
        ),
        (STORED, ("data.image.flip=true",), "data.image.flip=true: has no effect with distill.stored"),
        (STORED, ("data.image.crop_scale=[0.5, 1]",), "remove it, or set it to its default, [0.9, 1.0]"),
        ("{}", (), "needs stored: {}, or teachers, such as [{run: FOLDER}], and has neither"),
        (
            "{stored: {}, teachers: [{run: x}]}",
            (),
            "needs stored: {}, or teachers, such as [{run: FOLDER}], not both",
        ),
        ("{weight: 0, stored: {}}", (), "nothing is learned"),
        ("{teachers: [{weights: x}]}", (), "exactly one of the keys run, model"),
    ],
)
def test_what_does_not_fit_is_refused(
    checked: Callable[..., Checked], distill: str, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        checked(distill, *overrides)


def test_a_teacher_that_is_not_there(checked: Callable[..., Checked]) -> None:
    (error,) = checked("{teachers: [{run: nowhere}]}").errors
    assert "distill.teachers.0.run" in error
    assert "does not exist" in error


def test_a_teacher_needs_weights_of_its_whole_model(checked: Callable[..., Checked], tmp_path: Path) -> None:
    """A tower's own are not enough: its projection would be random."""
    for weights in ("", f", weights: {tmp_path}/r.yaml"):
        model = f"{{image: {{timm: test_vit{weights}}}, text: {{arch: gpt2}}}}"
        (error,) = checked(f"{{teachers: [{{model: {model}}}]}}").errors
        assert "distill.teachers.0.model: a teacher needs weights of the whole model" in error


def test_a_teacher_that_takes_other_tokens_or_pixels(checked: Callable[..., Checked], tmp_path: Path) -> None:
    """The student's are its own unless it is said, and a frozen teacher never learns them."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 400, "max_position_embeddings": 40, "eos_token_id": ByteTokenizer.eos_id}
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 16})
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    pixels = {"image_processor": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}}
    (tmp_path / "clip/processor_config.json").write_text(json.dumps(pixels))
    teacher = f"{{teachers: [{{model: {{dual: {{hf: {tmp_path}/clip, weights: pretrained}}}}}}]}}"
    found = examine(checked(teacher).recipe, 1, None)
    assert "distill.teachers.0.text.tokenizer: it has 259 tokens, and" in found.errors[0]
    assert "distill.teachers.0.image: " in found.warnings[0]
    assert "mean [0.5, 0.5, 0.5]" in found.warnings[0]


def test_the_names_of_a_teacher_are_fetched_at_submission(
    checked: Callable[..., Checked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = checked(TEACHER)
    names = hub_names(found.recipe)
    assert "*.safetensors" in names["some/teacher"]
    assert "another/one" in names
    assert {"distill.teachers.0.model.dual.hf", "distill.teachers.0.text.tokenizer"} <= {
        words.split()[0] for words in found.unchecked
    }
