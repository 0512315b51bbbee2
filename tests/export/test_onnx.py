"""Exports to ONNX: onnxruntime's features are the model's, for any batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    CAPTIONS,
    CLIP_TEXT,
    CLIP_VIT,
    GPT2,
    dual_folder,
    opened_of,
    own_features,
    read,
    recipe_of,
    towers_folders,
)

from clipcluster.build.loaded import Transform
from clipcluster.errors import UserError
from clipcluster.export import onnx_files
from clipcluster.export.onnx_files import write

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CONVNEXT = {"timm": "convnext_atto", "args": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}}


def described(kind: str, folder: Path) -> dict[str, Any]:
    if kind == "clip":
        return {"model": {"image": CLIP_VIT, "text": CLIP_TEXT}}
    if kind == "convnext-gpt2":
        return {"model": {"image": CONVNEXT, "text": GPT2}}
    if kind == "clip-roberta":
        return {"model": towers_folders("clip", folder)}
    if kind == "resnet-bert":
        bert = towers_folders("vit", folder)["text"]
        return {"model": {"image": {"timm": "resnet10t"}, "text": {**bert, "pool": "mean"}}}
    dual: dict[str, Any] = {"dual": {"hf": str(dual_folder(kind, folder / kind))}}
    if kind == "siglip":
        return {"model": {**dual, "embed_dim": 512, "logit_bias": {}}, "loss": {"name": "siglip"}}
    return {"model": dual}


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", ["clip", "convnext-gpt2", "clip-roberta", "resnet-bert", "chinese_clip", "siglip"]
)
def test_features_for_any_batch_and_of_the_same_files(
    kind: str, tmp_path: Path, photographs: list[Path]
) -> None:
    ours = opened_of(recipe_of(**described(kind, tmp_path)))
    out = tmp_path / "out"
    out.mkdir()
    write(ours, out)
    about = read(out / "towers.json")
    for name in ("image", "text"):
        onnx.checker.check_model(str(out / f"{name}.onnx"))
        (opset,) = {each.version for each in onnx.load(out / f"{name}.onnx").opset_import if not each.domain}
        assert opset == about[name]["opset"] == onnx_files.OPSET
    image, text = (onnxruntime.InferenceSession(str(out / f"{name}.onnx")) for name in ("image", "text"))
    assert [each.name for each in text.get_inputs()] == ["input_ids", "attention_mask"]
    transform = Transform(ours.recipe.data.image)
    from_files = torch.stack([transform(file) for file in photographs])
    for count in (1, 2, 7, 64):
        pixels = from_files if count == 64 else torch.randn(count, 3, 32, 32)
        tokens, mask = ours.tokenizer(CAPTIONS[:count])
        with torch.no_grad():
            expected = ours.model.encode_image(pixels), ours.model.encode_text(tokens, mask)
        if count == 64:
            assert torch.equal(expected[0], own_features(ours, photographs)[0])
            assert (expected[0][0] - expected[0][1]).abs().max() > 1e-3
        (found,) = image.run(None, {"pixel_values": pixels.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected[0], atol=1e-5, rtol=0)
        words = {"input_ids": tokens.numpy(), "attention_mask": mask.long().numpy()}
        (found,) = text.run(None, words)
        torch.testing.assert_close(torch.from_numpy(found), expected[1], atol=1e-5, rtol=0)


@pytest.mark.long
def test_a_classifier(tmp_path: Path) -> None:
    ours = opened_of(recipe_of({"image": CONVNEXT, "classes": 3}, task="classify"))
    write(ours, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "classifier.onnx",
        "preprocessor_config.json",
        "towers.json",
    ]
    session = onnxruntime.InferenceSession(str(tmp_path / "classifier.onnx"))
    pixels = torch.randn(5, 3, 32, 32)
    (found,) = session.run(None, {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), ours.model.classify(pixels), atol=1e-5, rtol=1e-5)


def test_without_onnxruntime_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_files, "_NEEDED", ("onnx", "no_such_runtime"))
    with pytest.raises(UserError, match=r"needs no_such_runtime, which is not installed: pip install"):
        write(opened_of(recipe_of({"image": CONVNEXT, "text": GPT2})), tmp_path)
