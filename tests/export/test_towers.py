"""Towers by themselves: loaded by timm and transformers, and as the start of another run."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import CAPTIONS, CLIP_TEXT, CLIP_VIT, GPT2, opened_of, read, recipe_of, towers_folders
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

from clipcluster.errors import UserError
from clipcluster.export.towers import write

CONVNEXT = {"timm": "convnext_atto", "args": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}}


@torch.no_grad()
def test_a_network_of_timm_and_one_of_transformers(tmp_path: Path) -> None:
    ours = opened_of(recipe_of({"image": CONVNEXT, "text": GPT2}))
    write(ours, tmp_path)
    about, joining = read(tmp_path / "towers.json"), load_file(tmp_path / "projections.safetensors")
    assert joining.keys() == {"image_projection.weight", "text_projection.weight", "logit_scale"}
    image = about["image"]
    network = timm.create_model(image["model_name"], **image["arguments"]).eval()
    network.load_state_dict(load_file(tmp_path / image["file"]))
    pixels = torch.randn(2, 3, 32, 32)
    expected = ours.model.encode_image(pixels)
    found = nn.functional.normalize(network(pixels) @ joining["image_projection.weight"].T, dim=-1)
    torch.testing.assert_close(found, expected)
    text, tokenizer = (
        AutoModel.from_pretrained(tmp_path / "text").eval(),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    words = tokenizer(CAPTIONS[:5], padding="max_length", truncation=True, return_tensors="pt")
    states = text(input_ids=words["input_ids"], attention_mask=words["attention_mask"]).last_hidden_state
    vectors = states[torch.arange(5), words["attention_mask"].sum(dim=1) - 1]
    found = nn.functional.normalize(vectors @ joining["text_projection.weight"].T, dim=-1)
    torch.testing.assert_close(
        found, ours.model.encode_text(*ours.tokenizer(CAPTIONS[:5])), atol=1e-5, rtol=0
    )
    assert about["text"]["vector"] == "last_hidden_state at the last token that is not padding"
    # Another run starts from them.
    starts = {
        "image": {**CONVNEXT, "weights": str(tmp_path / "image.safetensors")},
        "text": {**GPT2, "weights": str(tmp_path / "text")},
    }
    assert_started(recipe_of(starts), ours.model)


def assert_started(recipe: Any, source: Any) -> None:
    """Both towers take every tensor of their files, and are equal bit for bit."""
    model = opened_of(recipe, seed=None).model
    assert [(each.fraction, each.unexpected) for each in model.starting_weights] == [(1.0, ())] * 2
    own = source.state_dict()
    for name, value in model.state_dict().items():
        if name.startswith(("image.", "text.")):
            assert torch.equal(value, own[name]), name


@pytest.mark.long
def test_clips_towers(tmp_path: Path) -> None:
    ours = opened_of(recipe_of({"image": CLIP_VIT, "text": CLIP_TEXT}))
    write(ours, tmp_path)
    assert read(tmp_path / "text" / "config.json")["architectures"] == ["CLIPTextModel"]
    starts = {
        "image": {**CLIP_VIT, "weights": str(tmp_path / "image.safetensors")},
        "text": {**CLIP_TEXT, "weights": str(tmp_path / "text")},
    }
    assert_started(recipe_of(starts), ours.model)


@pytest.mark.parametrize("kind", [pytest.param("clip", marks=pytest.mark.long), "vit"])
def test_towers_of_transformers(kind: str, tmp_path: Path) -> None:
    model = towers_folders(kind, tmp_path)
    ours = opened_of(recipe_of(model))
    write(ours, tmp_path / "out")
    starts = {name: {**model[name], "weights": str(tmp_path / "out" / name)} for name in model}
    assert_started(recipe_of(starts), ours.model)
    # The folder is also one that a tower can be named by.
    named = {
        name: {**model[name], "hf": str(tmp_path / "out" / name), "weights": "pretrained"} for name in model
    }
    assert_started(recipe_of(named), ours.model)


def test_a_classifier_has_a_head(tmp_path: Path) -> None:
    ours = opened_of(recipe_of({"image": CONVNEXT, "classes": 3}, task="classify"))
    write(ours, tmp_path)
    head = load_file(tmp_path / "head.safetensors")
    assert torch.equal(head["head.weight"], ours.model.head.weight)
    assert not (tmp_path / "text").exists()
    file = str(tmp_path / "image.safetensors")
    start = recipe_of({"image": {**CONVNEXT, "weights": file}, "classes": 3}, task="classify")
    (coverage,) = opened_of(start, seed=None).model.starting_weights
    assert coverage.fraction == 1.0


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    ours = opened_of(recipe_of({"image": CONVNEXT, "text": GPT2}))
    ours.model.text.register_forward_hook(lambda module, given, vectors: vectors + 0.1)
    with pytest.raises(UserError, match="the exported text tower does not compute what the model does"):
        write(ours, tmp_path)
