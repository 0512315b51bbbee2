"""Folders with a model in them: what each is opened as, its weights, and its preprocessing."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTImageProcessor,
)

from clipcluster.build.hugging_face_folder import crop_pct
from clipcluster.build.loaded import Transform
from clipcluster.build.opened import find_model, model_folder
from clipcluster.errors import UserError
from clipcluster.run import evaluate
from clipcluster.runs.folder import Run
from tests.tiny_run import NAMES, captions, picture, write_run, write_shards
from tests.tiny_sizes import LAYERS, SIZE, VISION

WORDS = ["[PAD]", "[CLS]", "[UNK]", "[SEP]", "a", "number", "picture", "photo", "of", *NAMES]
WORDS += [str(number) for number in range(10)]
LENGTH = 12
TEXT = {
    **LAYERS,
    "vocab_size": len(WORDS),
    "max_position_embeddings": LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "pairs")


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny-00000000", shards)


def holds(opened: Any, file: Path) -> bool:
    """Whether a model has the weights of a file."""
    state = load_file(file)
    return all(torch.equal(value, state[name]) for name, value in opened.model.state_dict().items())


def test_a_run_and_its_checkpoints(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest, older = (run.checkpoints / f"step-0000000{step}" for step in (8, 3))
    opened = model_folder(run.path).open(device="cpu")
    assert (opened.path, opened.step, opened.averaged, opened.name) == (newest, 8, True, "tiny-00000000")
    assert holds(opened, newest / "ema.safetensors")
    assert not opened.model.training
    assert opened.tokenizer is not None
    assert opened.recipe.model.embed_dim == opened.model.embed_dim == 16
    raw = model_folder(older).open(weights="raw", device="cpu")
    assert (raw.path, raw.step, raw.averaged) == (older, 3, False)
    assert holds(raw, older / "model.safetensors")
    assert find_model("tin", run.path.parent).path == run.path
    copy = shutil.copytree(older, tmp_path / "elsewhere")
    alone = model_folder(copy).open(device="cpu")
    assert (alone.step, alone.averaged, alone.name) == (3, True, "tiny elsewhere")
    assert holds(alone, older / "ema.safetensors")
    # Only what is read has to be whole: of a damaged average the checkpoint before is taken.
    with open(
        shutil.copytree(run.path, tmp_path / "damaged") / newest.relative_to(run.path) / "ema.safetensors",
        "r+b",
    ) as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert model_folder(tmp_path / "damaged").open(device="cpu").step == 3
    assert "passed over for step-00000003: step-00000008: the content of ema.safetensors" in caplog.text
    assert model_folder(tmp_path / "damaged").open(weights="raw", device="cpu").step == 8
    # Raw weights never stand in for an average that was lost.
    (tmp_path / "damaged" / newest.relative_to(run.path) / "ema.safetensors").unlink()
    opened = model_folder(tmp_path / "damaged").open(device="cpu")
    assert (opened.step, opened.averaged) == (3, True)
    assert "step-00000008: ema.safetensors is missing" in caplog.text


def test_a_training_may_delete_the_checkpoints_that_were_found(shards: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "tiny", shards, "train.ema=null")
    newest, older = (run.checkpoints / f"step-0000000{step}" for step in (8, 3))
    aside = newest.rename(tmp_path / "saved-later")
    found = model_folder(run.path)
    aside.rename(newest)  # between finding and opening, while torch is loaded
    shutil.rmtree(older)
    assert found.open(device="cpu").step == 8
    (newest / "manifest.json").unlink()
    with pytest.raises(UserError, match=rf"in {run.checkpoints} has .* after the run's next save"):
        found.open(device="cpu")


def test_what_cannot_be_opened_is_told(run: Run, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"contains no model; give a run, one of its checkpoints, a dual encoder"
    ):
        model_folder(tmp_path).open()
    (tmp_path / "towers").mkdir()
    (tmp_path / "towers" / "export.json").write_text('{"format": "safetensors"}')
    with pytest.raises(
        UserError, match="is an export of format safetensors, which is not read here; give the run"
    ):
        model_folder(tmp_path / "towers").open()
    with pytest.raises(UserError, match="is not a folder; give"):
        model_folder(tmp_path / "nothing").open()
    with pytest.raises(UserError, match="There is no run 'nothing'"):
        find_model("nothing", run.path.parent)
    for name, told in (
        (str(tmp_path / "nothing"), "is not a folder; give"),
        (str(run.path / "recipe.yaml"), r"recipe\.yaml is not a folder; give"),
        (str(run.checkpoints / "step-999"), r"step-999 is not a complete checkpoint; .* has step-00000008"),
    ):
        with pytest.raises(UserError, match=told):
            find_model(name, run.path.parent)
    empty = write_run(tmp_path / "runs" / "empty", shards, "train.ema=null", steps=())
    with pytest.raises(UserError, match="empty has no checkpoint: none was written yet"):
        model_folder(empty.path).open()
    with pytest.raises(
        UserError, match=r"step-00000004 is not a complete checkpoint; .* has step-00000008, step"
    ):
        model_folder(run.checkpoints / "step-00000004").open()
    bare = shutil.copytree(run.checkpoints / "step-00000003", tmp_path / "bare")
    manifest = json.loads((bare / "manifest.json").read_text())
    del manifest["files"]["ema.safetensors"]
    (bare / "manifest.json").write_text(json.dumps(manifest))
    (bare / "ema.safetensors").unlink()
    assert model_folder(bare).open(device="cpu").averaged is False
    with pytest.raises(UserError, match=r"averaged weights that verify .* kept by train\.ema"):
        model_folder(bare).open(weights="ema")
    state = json.loads((bare / "state.json").read_text()) | {"format": 99}
    (bare / "state.json").write_text(json.dumps(state))
    content = (bare / "state.json").read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    newer = {**manifest, "files": {**manifest["files"], "state.json": entry}}
    (bare / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(
        UserError, match=r"has format 99; this version reads 1 and 2\. Resume with the version"
    ):
        model_folder(bare).open()
    del manifest["recipe"]
    (bare / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"is not in a run folder .* has no recipe"):
        model_folder(bare).open()


def save_clip(folder: Path) -> Any:
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))
    CLIPImageProcessor(size={"shortest_edge": 36}, crop_size=SIZE).save_pretrained(folder)
    return model


def save_chinese(folder: Path) -> Any:
    text = TEXT | {"max_position_embeddings": 60}
    ChineseCLIPImageProcessor(size={"height": SIZE, "width": SIZE}, do_center_crop=False).save_pretrained(
        folder
    )
    return ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


def save_siglip(folder: Path) -> Any:
    text = TEXT | {"hidden_size": 32, "projection_size": 32}
    SiglipImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))


def save_pair(folder: Path) -> Any:
    text = RobertaConfig(**TEXT | {"max_position_embeddings": LENGTH + 1})
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        CLIPVisionConfig(**VISION), text, projection_dim=8
    )
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return VisionTextDualEncoderModel(config)


def saved(folder: Path, save: Callable[[Path], Any]) -> Any:
    """A folder of transformers' with a random model, every parameter drawn; the model."""
    torch.manual_seed(0)
    model = save(folder).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    model.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 3)]
    )
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "eos_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)
    fast.save_pretrained(folder)
    return model


@torch.no_grad()
def features_of(model: Any, folder: Path, files: list[Path], texts: list[str]) -> tuple[Tensor, Tensor]:
    """transformers' own features of files and texts, with its own preprocessing, of length one."""
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)  # by Pillow
    pixels = [
        processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"] for file in files
    ]
    tokens = AutoTokenizer.from_pretrained(folder)(
        texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    more = {} if model.config.model_type == "siglip" else {"attention_mask": tokens["attention_mask"]}
    found = [
        model.get_image_features(pixel_values=torch.cat(pixels)),
        model.get_text_features(input_ids=tokens["input_ids"], **more),
    ]
    image, text = (each if isinstance(each, Tensor) else each.pooler_output for each in found)
    return functional.normalize(image, dim=-1), functional.normalize(text, dim=-1)


@pytest.mark.parametrize(
    "save",
    [
        save_clip,
        save_chinese,
        *(pytest.param(kind, marks=pytest.mark.long) for kind in (save_siglip, save_pair)),
    ],
)
def test_features_of_a_folder_are_those_of_transformers(tmp_path: Path, save: Callable[[Path], Any]) -> None:
    """Preprocessing and tokenizer included, from the same files."""
    folder = tmp_path / "model"
    theirs = saved(folder, save)
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for number, file in enumerate(files):
        file.write_bytes(picture(number, [(40, 60), (60, 40), (33, 33), (100, 50)][number]))
    texts = ["a cat number 1", "picture of a " + "dog " * 20, "bee"]
    image, text = features_of(theirs, folder, files, texts)
    opened = model_folder(folder).open(device="cpu")
    assert (opened.path, opened.step, opened.averaged, opened.name) == (folder, None, False, "model")
    transform = Transform(opened.recipe.data.image)
    assert transform.size == SIZE
    if save is save_chinese:
        assert opened.tokenizer.context_length == 52
        texts[1] = "picture of a " + "dog " * 7  # what 12 tokens leave of it
    else:
        assert opened.tokenizer.context_length == LENGTH
    with torch.no_grad():
        ours = opened.model.encode_image(torch.stack([transform(file) for file in files]))
        torch.testing.assert_close(ours, image, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            opened.model.encode_text(*opened.tokenizer(texts)), text, atol=1e-5, rtol=1e-5
        )
    assert (text[0] - text[1]).abs().max() > 1e-3


def test_a_model_of_transformers_is_measured_as_its_own_code_measures(tmp_path: Path, shards: Path) -> None:
    folder = tmp_path / "theirs"
    theirs = saved(folder, save_clip)
    files = [tmp_path / f"{number}.png" for number in range(10)]
    for number, file in enumerate(files):
        file.write_bytes(picture(number))
    texts = [text for number in range(10) for text in captions(number)]
    prompts = [template.format(name) for name in NAMES for template in ("a {}", "a photo of a {}.")]
    image, text = features_of(theirs, folder, files, texts)
    classes = functional.normalize(
        features_of(theirs, folder, files[:1], prompts)[1].unflatten(0, (4, 2)).mean(1), dim=-1
    )
    similar = image @ text.T
    i2t = (similar.argmax(dim=1) // 2 == torch.arange(10)).double().mean().item()
    t2i = (similar.argmax(dim=0) == torch.arange(20) // 2).double().mean().item()
    top1 = ((image @ classes.T).argmax(dim=1) == torch.arange(10) % 4).double().mean().item()
    sets = [f"evaluate.{kind}=[{shards}]" for kind in ("retrieval", "zero_shot")]
    document = evaluate(folder, overrides=[*sets, "data.workers=0"])
    assert (document["run"], document["step"], document["checkpoint"]) == (None, None, str(folder))
    metrics = document["metrics"]
    assert (metrics["pairs/i2t_r1"], metrics["pairs/t2i_r1"]) == (i2t, t2i)
    assert metrics["pairs/zero_shot_top1"] == top1
    with pytest.raises(UserError, match="There is nothing to measure: name shard folders in evaluate"):
        evaluate(folder)
    with pytest.raises(UserError, match="holds no averaged"):
        model_folder(folder).open(weights="ema")


def test_preprocessing_that_is_not_supported_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, save_clip)
    file = tmp_path / "preprocessor_config.json"
    written = json.loads(file.read_text())
    for change, told in (
        ({"do_center_crop": False}, "not to a square"),
        ({"size": {"height": 32, "width": 40}}, "not to a square"),
        ({"size": {"shortest_edge": 30}}, "pads images from 30 to 32 pixels"),
        ({"resample": 1}, "interpolation 1"),
        ({"do_resize": False}, "does not resize"),
        ({"rescale_factor": 1.0}, "does not scale pixels"),
    ):
        file.write_text(json.dumps(written | change))
        with pytest.raises(UserError, match=told):
            model_folder(tmp_path).open()
    for change in (
        {"resample": [3]},
        {"rescale_factor": "x"},
        {"size": [32]},
        {"size": {"shortest_edge": [32]}},
        {"crop_size": {"height": "x", "width": "x"}},
        {"image_mean": 0.5},
        {"image_std": [0.0, 0.0, 0.0]},
        {"image_processor_type": ["x"]},
    ):
        file.write_text(json.dumps(written | change))
        with pytest.raises(UserError, match=str(tmp_path)):
            model_folder(tmp_path).open()
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be read"):
        model_folder(tmp_path).open()
    file.unlink()
    with pytest.raises(UserError, match=r"has no preprocessor_config\.json"):
        model_folder(tmp_path).open()


def test_configurations_of_odd_values_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, save_clip)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    for change in (
        {"model_type": ["clip"]},
        {"text_config": 3},
        {"projection_dim": "x"},
        {"projection_dim": 10**15},
        {"text_config": {**written["text_config"], "max_position_embeddings": "x"}},
        {"text_config": {**written["text_config"], "num_attention_heads": 0}},
        {"vision_config": {**written["vision_config"], "patch_size": 0}},
        {"auto_map": {"AutoConfig": "theirs.Config"}, "model_type": "theirs"},
    ):
        file.write_text(json.dumps(written | change))
        with pytest.raises(UserError):
            model_folder(tmp_path).open(device="cpu")
    (tmp_path / "theirs.py").write_text("raise SystemExit(1)")
    with pytest.raises(UserError, match="custom code"):
        model_folder(tmp_path).open()
    file.write_text("[]")
    with pytest.raises(UserError, match=str(tmp_path)):
        model_folder(tmp_path).open()


@pytest.mark.parametrize("squash", [False, True])
def test_a_model_of_open_clip_gives_its_own_features(tmp_path: Path, squash: bool) -> None:
    """Its preprocessing and tokenizer included, from the same files."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": SIZE, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    text = {"context_length": LENGTH, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    folder = tmp_path / "oc"
    folder.mkdir()
    save_file(open_clip.CLIP(8, vision, text).state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "resize_mode": "squash" if squash else "shortest",
    }
    document = {
        "model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": preprocess,
    }
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    file = tmp_path / "1.png"
    file.write_bytes(picture(1, (60, 40)))
    theirs, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    texts = ["a cat number 1", "Two dogs &amp; a " + "very " * 20 + "long street"]
    opened = model_folder(folder).open(device="cpu")
    assert (opened.path, opened.step, opened.name) == (folder, None, "oc")
    with torch.no_grad():
        image = theirs.eval().encode_image(prepare(Image.open(file))[None], normalize=True)
        ours = opened.model.encode_image(Transform(opened.recipe.data.image)(file)[None])
        torch.testing.assert_close(ours, image, atol=1e-5, rtol=1e-5)
        text = theirs.encode_text(open_clip.SimpleTokenizer(context_length=LENGTH)(texts), normalize=True)
        ours = opened.model.encode_text(*opened.tokenizer(texts))
        torch.testing.assert_close(ours, text, atol=1e-5, rtol=1e-5)


@settings(max_examples=40)
@given(st.integers(1, 1500), st.integers(0, 1500))
def test_a_crop_as_a_fraction_gives_the_resized_side_back(size: int, more: int) -> None:
    fraction = crop_pct(size, size + more)
    assert math.floor(size / fraction) == size + more
    assert 0 < fraction <= 1
