"""Exports to transformers: the same features from the same files, and back again."""

from collections.abc import Collection, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import CLIP_TEXT, CLIP_VIT, GPT2, dual_folder, opened_of, own_features, recipe_of, towers_folders
from PIL import Image
from transformers import AutoModel, AutoProcessor

from clipcluster.build.opened import Opened
from clipcluster.data.images.decode import decode
from clipcluster.data.images.transforms import evaluation_transform
from clipcluster.data.loading.batch import normalise
from clipcluster.errors import UserError
from clipcluster.export.hugging_face import write
from clipcluster.export.preprocessing import write_image_processor

SIGLIP_VIT = {**CLIP_VIT, "timm": "vit_base_patch16_siglip_224"}
SIGLIP_TEXT = {
    "clip": {
        "width": 16,
        "layers": 2,
        "heads": 2,
        "tanh_gelu": True,
        "causal": False,
        "pool": "last_position",
        "norm_eps": 1e-6,
    }
}
KINDS = {
    "timm": "CLIPModel",
    "clip": "CLIPModel",
    "chinese_clip": "ChineseCLIPModel",
    "siglip": "SiglipModel",
    "siglip-timm": "SiglipModel",
    "clip-roberta": "VisionTextDualEncoderModel",
    "vit-bert": "VisionTextDualEncoderModel",
}


def described(kind: str, folder: Path) -> dict[str, Any]:
    """The section `model` and the rest of a recipe, without weights."""
    if kind == "timm":
        return {"model": {"image": CLIP_VIT, "text": CLIP_TEXT}}
    if kind == "siglip-timm":
        model = {"image": SIGLIP_VIT, "text": SIGLIP_TEXT, "embed_dim": 16, "logit_bias": {}}
        model |= {"projections": {"image": "none"}, "projection_bias": ["text"]}
        return {"model": model, "loss": {"name": "siglip"}}
    if kind in ("clip-roberta", "vit-bert"):
        return {"model": towers_folders(kind.partition("-")[0], folder)}
    dual = {"dual": {"hf": str(dual_folder(kind, folder / kind))}}
    more: dict[str, Any] = {"model": dual}
    if kind == "siglip":
        more |= {"model": {**dual, "embed_dim": 512, "logit_bias": {}}, "loss": {"name": "siglip"}}
    return more


@torch.no_grad()
def their_features(folder: Path, photographs: list[Path]) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model as transformers reads it, and its features of the same files by its own processor."""
    theirs, processor = (
        AutoModel.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder, backend="pil"),
    )
    inputs = processor(
        images=[Image.open(file) for file in photographs],
        text=models.CAPTIONS,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    found = theirs(**inputs)
    return theirs, found.image_embeds, found.text_embeds


def slow(kinds: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Those that are not quick are tried by `make test-all` alone."""
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.long) for kind in kinds]


@pytest.mark.parametrize("kind", slow(KINDS, ("timm", "vit-bert")))
def test_features_of_the_same_files_are_the_models(
    kind: str, tmp_path: Path, photographs: list[Path]
) -> None:
    given = described(kind, tmp_path)
    ours, out = opened_of(recipe_of(**given)), tmp_path / "out"
    out.mkdir()
    write(ours, out)
    theirs, image, text = their_features(out, photographs)
    assert type(theirs).__name__ == KINDS[kind]
    expected = own_features(ours, photographs)
    torch.testing.assert_close(image, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(text, expected[1], atol=1e-5, rtol=0)
    assert (image[0] - image[1]).abs().max() > 1e-3
    assert (text[0] - text[1]).abs().max() > 1e-3
    assert theirs.logit_scale.item() == ours.model.logit_scale.item()
    # Back again, as a whole dual encoder and as the weights of the same recipe.
    more = {key: value for key, value in given.items() if key != "model"}
    bias = {"logit_bias": {}} if kind.startswith("siglip") else {}
    whole = {"dual": {"hf": str(out), "weights": "pretrained"}, "embed_dim": 512, **bias}
    again = {**given["model"], "weights": str(out)}
    for model in (whole, again):
        back = opened_of(recipe_of(model, str(out), **more), seed=None)
        (coverage,) = back.model.starting_weights
        assert (coverage.fraction, coverage.missing, coverage.unexpected) == (1.0, (), ())
        for found, own in zip(own_features(back, photographs), expected, strict=True):
            torch.testing.assert_close(found, own, atol=1e-5, rtol=0)


@pytest.mark.long
def test_clips_own_tokenizer_becomes_transformers(tmp_path: Path, photographs: list[Path]) -> None:
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        pytest.skip("CLIP's vocabulary comes with open_clip")
    vocabulary = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    text = {"clip": {"width": 8, "layers": 1, "heads": 2}}
    image = {"timm": "vit_base_patch16_clip_224", "args": {**CLIP_VIT["args"], "depth": 1}}
    ours = opened_of(recipe_of({"image": image, "text": text}, str(vocabulary)))
    write(ours, tmp_path)
    theirs, images, words = their_features(tmp_path, photographs)
    assert theirs.config.text_config.hidden_act == theirs.config.vision_config.hidden_act == "gelu"
    for found, own in zip((images, words), own_features(ours, photographs), strict=True):
        torch.testing.assert_close(found, own, atol=1e-5, rtol=0)
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= {file.name for file in tmp_path.iterdir()}
    processor = AutoProcessor.from_pretrained(tmp_path)
    texts = ["it's NAÏVE — 12 cats!!", "a  photo\nof  two", "", "é" * 40]
    found = processor.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    tokens, mask = ours.tokenizer(texts)
    assert torch.equal(found["attention_mask"].bool(), mask)
    assert torch.equal(found["input_ids"][mask], tokens[mask])


@pytest.mark.parametrize(
    "rule",
    [
        {"evaluation": {"crop_pct": 0.875}, "interpolation": "bilinear"},
        {"evaluation": {"resize": "squash"}, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
    ],
)
def test_pixels_are_those_of_evaluation(
    rule: dict[str, Any], tmp_path: Path, photographs: list[Path]
) -> None:
    opened = bare(rule)
    write_image_processor(opened, tmp_path)
    found, own = pixels_of(opened, tmp_path, photographs[:8])
    side = int(models.SIZE / opened.recipe.data.image.evaluation.crop_pct)
    for one, other, file in zip(found, own, photographs[:8], strict=True):
        width, height = Image.open(file).size
        longer = int(side * max(width, height) / min(width, height))
        if opened.recipe.data.image.evaluation.resize == "squash" or (longer - models.SIZE) % 4 != 3:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_middle_may_be_a_pixel_off(tmp_path: Path) -> None:
    """Where 3, 7, 11, … pixels are to be cut off in all, transformers cuts one less at the beginning."""
    numbers = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (35, 32, 3), generator=numbers, dtype=torch.uint8)
    Image.fromarray(picture.numpy()).save(tmp_path / "x.png")
    opened = bare({"std": [1.0, 1.0, 1.0], "mean": [0.0, 0.0, 0.0]})
    write_image_processor(opened, tmp_path)
    found, own = pixels_of(opened, tmp_path, [tmp_path / "x.png"])
    assert torch.equal((found[0] * 255).round().byte(), picture[1:33].permute(2, 0, 1))
    assert torch.equal((own[0] * 255).round().byte(), picture[2:34].permute(2, 0, 1))


def bare(image: dict[str, Any]) -> Opened:
    recipe = recipe_of({"image": CLIP_VIT, "text": CLIP_TEXT}, image=image)
    return Opened(None, recipe, None, Path("/x"), None, False, "x")


def pixels_of(opened: Opened, folder: Path, files: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    found = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")[
        "pixel_values"
    ]
    image = opened.recipe.data.image
    rule = evaluation_transform(image)
    own = torch.stack([rule(decode(file.read_bytes())) for file in files])
    return found, normalise(own, image.mean, image.std)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (
            {"image": {"timm": "test_convnext"}, "text": CLIP_TEXT},
            {},
            r"model\.image\.timm: test_convnext is no",
        ),
        ({"image": {"timm": "test_vit"}, "text": CLIP_TEXT}, {}, r"model\.image\.timm: test_vit has other"),
        ({"image": CLIP_VIT, "text": GPT2}, {}, r"model\.text\.pool: last, but .* by pooler"),
        (
            {"image": CLIP_VIT, "text": CLIP_TEXT, "projection_bias": ["image"]},
            {},
            r"model\.projection_bias: .* without bias after the image tower",
        ),
        (
            {"image": CLIP_VIT, "text": CLIP_TEXT, "logit_bias": {}},
            {"loss": {"name": "siglip"}},
            r"model\.logit_bias: .*clip has no bias",
        ),
        ({"image": CLIP_VIT, "classes": 3}, {"task": "classify"}, r"task: classify trains no dual encoder"),
    ],
)
def test_what_has_no_form_is_refused_by_key(
    model: dict[str, Any], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        write(opened_of(recipe_of(model, **more)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    ours = opened_of(recipe_of({"image": CLIP_VIT, "text": CLIP_TEXT}))
    ours.model.image.register_forward_hook(lambda module, given, vectors: vectors + 0.1)
    with pytest.raises(UserError, match=r"transformers' clip does not compute .* of images differ by 0\.\d"):
        write(ours, tmp_path)
