"""Exports to OpenCLIP: the same pixels, tokens and features from the same files, and back again."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    CAPTIONS,
    SIZE,
    WORDS,
    dual_folder,
    opened_of,
    own_features,
    read,
    recipe_of,
    saved_run,
    sections,
    towers_folders,
)
from PIL import Image

from clipcluster.build.open_clip_folder import CONFIG
from clipcluster.build.open_clip_folder import recipe_of as sections_of_folder
from clipcluster.build.opened import Opened, described
from clipcluster.data.images.decode import decode
from clipcluster.data.images.transforms import evaluation_transform
from clipcluster.errors import UserError
from clipcluster.export.export import export
from clipcluster.export.open_clip import export_open_clip

open_clip = pytest.importorskip("open_clip")
BPE = str(Path(open_clip.tokenizer.default_bpe()))
VIT_ARGS = {
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 1,
    "mlp_ratio": 2.5,
    "init_values": 0.5,
}
VIT = {"timm": "vit_base_patch16_clip_quickgelu_224", "args": VIT_ARGS}
WORDS_OF_CLIP = {"width": 16, "layers": 2, "heads": 2}
SIGLIP_TEXT = {**WORDS_OF_CLIP, "causal": False, "pool": "last_position", "norm_eps": 1e-6, "tanh_gelu": True}
BERT = {
    "arch": "bert",
    "config": {key: WORDS[key] for key in WORDS if key.endswith(("_size", "layers", "heads"))},
}
CONVNEXT = {"timm": "test_convnext", "args": {"drop_path_rate": 0.1}}
KINDS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    # OpenCLIP's own ViT and text transformer, with its tokenizer.
    "own": ({"image": VIT, "text": {"clip": {**WORDS_OF_CLIP, "quick_gelu": True}}}, BPE, {}),
    # timm's network, SigLIP's text transformer, bytes as tokens.
    "siglip": (
        {
            "image": CONVNEXT,
            "text": {"clip": SIGLIP_TEXT},
            "logit_bias": {},
            "projection_bias": ["text", "image"],
        },
        "bytes",
        {"loss": {"name": "siglip"}, "image": {"evaluation": {"resize": "squash"}, "mean": [0.5] * 3}},
    ),
    # A text tower of transformers, projections of two layers.
    "bert": (
        {"image": CONVNEXT, "text": {**BERT, "pool": "mean"}, "projections": {"image": "mlp", "text": "mlp"}},
        "bytes",
        {"image": {"interpolation": "bilinear"}},
    ),
    # The pooling is given to timm, and the network's own classifier is the projection.
    "pooled": (
        {
            "image": {"timm": "test_resnet", "args": {"global_pool": "max"}},
            "text": {"clip": {**WORDS_OF_CLIP, "pool": "first", "causal": False}},
            "projection_bias": ["image"],
        },
        BPE,
        {},
    ),
}


def exported(kind: str, folder: Path) -> Opened:
    model, tokenizer, more = KINDS[kind]
    opened = opened_of(recipe_of(model, tokenizer, **deepcopy(more)))
    folder.mkdir()
    export_open_clip(opened, folder)
    return opened


def featured(folder: Path, photographs: list[Path]) -> tuple[Any, Any, Any]:
    """The model as OpenCLIP reads it, and its features by its own transform and tokenizer."""
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    pixels = torch.stack([preprocess(Image.open(file)) for file in photographs])
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    theirs.eval()
    return theirs, theirs.encode_image(pixels, normalize=True), theirs.encode_text(tokens, normalize=True)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["own", "siglip", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("bert", "pooled"))]
)
def test_features_of_the_same_files_are_the_models(
    kind: str, tmp_path: Path, photographs: list[Path]
) -> None:
    out = tmp_path / "out"
    ours = exported(kind, out)
    theirs, image, text = featured(out, photographs)
    expected = own_features(ours, photographs)
    torch.testing.assert_close(image, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(text, expected[1], atol=1e-5, rtol=0)
    assert (image[0] - image[1]).abs().max() > 1e-3
    assert (text[0] - text[1]).abs().max() > 1e-3
    assert theirs.logit_scale.item() == ours.model.logit_scale.item()
    assert (theirs.logit_bias is None) == (ours.model.logit_bias is None)
    # Back again, by what the folder says alone.
    back = described(out, sections_of_folder(out)).open(device="cpu")
    (coverage,) = back.model.starting_weights
    assert (coverage.fraction, coverage.missing, coverage.unexpected) == (1.0, (), ())
    for found, own in zip(own_features(back, photographs), expected, strict=True):
        torch.testing.assert_close(found, own, atol=1e-5, rtol=0)
    again = tmp_path / "again"
    again.mkdir()
    export_open_clip(back, again)
    first, second = (read(folder / CONFIG) for folder in (out, again))
    for config in (first, second):
        config["model_cfg"]["text_cfg"].pop("hf_model_name", None)
        config["model_cfg"]["text_cfg"].pop("hf_tokenizer_name", None)
        config["model_cfg"]["vision_cfg"].pop("timm_drop_path", None)
    assert first == second


@torch.no_grad()
def test_a_run_is_exported_averaged_or_raw(tmp_path: Path, photographs: list[Path]) -> None:
    """Of a tower of transformers OpenCLIP finds the configuration where the folder lies in the end."""
    model, tokenizer, more = KINDS["bert"]
    run, both = saved_run(tmp_path / "runs" / "tiny-12345678", sections(model, tokenizer, **deepcopy(more)))
    for weights in ("ema", "raw"):
        out = tmp_path / weights
        opened = export(str(run.path), "open_clip", out, weights=weights)
        assert opened.averaged == (weights == "ema")
        assert read(out / CONFIG)["model_cfg"]["text_cfg"]["hf_model_name"] == str(out.resolve())
        _, image, text = featured(out, photographs[:4])
        expected = own_features(both[weights], photographs[:4])
        torch.testing.assert_close(image, expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(text, expected[1], atol=1e-5, rtol=0)


def test_pixels_are_openclips_bit_for_bit(photographs: list[Path]) -> None:
    """From the file on: decoding, resizing, cropping. Only a file's orientation is applied here alone."""
    for changes in ({}, {"evaluation": {"resize": "squash"}}, {"interpolation": "bilinear"}):
        recipe = recipe_of({"image": VIT, "text": {"clip": WORDS_OF_CLIP}}, image=dict(changes))
        rule = evaluation_transform(recipe.data.image)
        theirs = open_clip.transform.image_transform(
            SIZE,
            is_train=False,
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
            resize_mode=recipe.data.image.evaluation.resize,
            interpolation=recipe.data.image.interpolation,
        )
        for file in photographs:
            own = rule(decode(file.read_bytes()))
            assert torch.equal(own, (theirs(Image.open(file)) * 255).round().to(torch.uint8)), file


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (
            {"image": {**VIT, "args": {**VIT_ARGS, "class_token": False, "global_pool": "avg"}}},
            {},
            r"model\.image\.args\.class_token: False, but OpenCLIP .* allowed are attn_drop_rate",
        ),
        *(
            (
                {"image": {"timm": "vit_base_patch16_clip_224", "args": {**VIT_ARGS, **bare}}},
                {},
                r"model\.image\.args\.depth: 2, but OpenCLIP builds vit_base_patch16_clip_224 as",
            )
            for bare in ({"qkv_bias": False}, {"final_norm": False}, {"no_embed_class": True})
        ),
        (
            {"image": {"timm": "test_vit"}},
            {},
            r"model\.image\.timm: .* for images of 160 pixels, and image_size is 32",
        ),
        (
            {"text": {"arch": "gpt2", "config": {"n_layer": 1, "n_embd": 16, "n_head": 2}}},
            {},
            r"model\.text: gpt2, and OpenCLIP takes of transformers roberta, xlm-roberta, bert alone",
        ),
        (
            {"text": {**BERT, "pool": "last"}},
            {},
            r"model\.text\.pool: last, and OpenCLIP .*mean_pooler|pools .*mean",
        ),
        (
            {"text": BERT, "projection_bias": ["text"]},
            {},
            r"model\.projection_bias: text, and OpenCLIP's projection",
        ),
        (
            {"text": {"clip": WORDS_OF_CLIP}, "projections": {"text": "mlp"}},
            {},
            r"model\.projections\.text: mlp, .*allowed with model\.text\.clip: linear, none",
        ),
        ({}, {"image": {"evaluation": {"crop_pct": 0.875}}}, r"data\.image\.evaluation\.crop_pct: 0\.875"),
    ],
)
def test_what_openclip_has_not_is_refused_by_key(
    tmp_path: Path, model: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    towers = {"image": CONVNEXT, "text": {"clip": WORDS_OF_CLIP}}
    opened = opened_of(recipe_of({**towers, **model}, **deepcopy(more)))
    with pytest.raises(UserError, match=message):
        export_open_clip(opened, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_classifier_is_none_of_openclips_models(tmp_path: Path) -> None:
    opened = opened_of(recipe_of({"image": CONVNEXT, "classes": 3}, task="classify"))
    with pytest.raises(UserError, match=r"task: classify trains no dual encoder"):
        export_open_clip(opened, tmp_path)


def test_towers_of_transformers_are_refused_by_key(tmp_path: Path) -> None:
    for key, model in (
        ("model.image.hf", towers_folders("vit", tmp_path)),
        ("model.dual", {"dual": {"hf": str(dual_folder("clip", tmp_path / "clip"))}}),
    ):
        with pytest.raises(UserError, match=rf"{key}: .*choose --format hf"):
            export_open_clip(opened_of(recipe_of(model)), tmp_path)
