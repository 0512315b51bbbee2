"""OpenCLIP's configurations as recipes: each of its own maps to the same network, or is refused by name."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from clipcluster.build import open_clip_folder as folders
from clipcluster.build.open_clip_folder import CONFIG, VOCABULARY, recipe_of, sections_of
from clipcluster.errors import UserError
from clipcluster.export.open_clip_config import config_of
from clipcluster.model.clip import Clip, build_clip
from clipcluster.model.layouts import LAYOUTS, as_open_clip
from clipcluster.recipe.sections.data import Text
from clipcluster.recipe.sections.image import Image
from clipcluster.recipe.sections.loss import Loss
from clipcluster.recipe.sections.model import Model

open_clip = pytest.importorskip("open_clip")
from open_clip.factory import get_model_config  # noqa: E402  after the guard
from open_clip.model import CLIP, CustomTextCLIP  # noqa: E402

ENCODER = r"hf_model_name: .* allowed: roberta, xlm-roberta, bert, and this is"
REFUSED = {
    r"coca_.*": r"model_cfg\.multimodal_cfg: a generative text decoder \(CoCa\)",
    r"mt5-.*": rf"{ENCODER} mt5",
    r"nllb-clip-.*": rf"{ENCODER} m2m_100",
    r".*-CLIPA.*": r"vision_cfg\.(no_ln_pre: True|pool_type: 'avg')",
    r"ViTamin-XL-384": r"images of 384 pixels, and image_size is 256",
}
"""By the names of OpenCLIP's configurations; each other one maps."""
SMALL = {
    *("ViT-M-16-alt", "RN50", "convnext_tiny", "ViT-B-16-SigLIP2", "roberta-ViT-B-32"),
    *("coca_ViT-B-32", "mt5-base-ViT-B-32", "ViT-L-14-CLIPA"),
}
ALL = [
    pytest.param(name, marks=() if name in SMALL else pytest.mark.long) for name in open_clip.list_models()
]


@dataclass(frozen=True)
class Tokens:
    """What a tower needs to know of a tokenizer."""

    vocab_size: int
    context_length: int
    pad_id: int = 1
    eos_id: int = 2


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small configurations by the text towers' names, as both programs find them in the current folder."""
    from transformers import M2M100Config, MT5Config, RobertaConfig, XLMRobertaConfig

    folder = tmp_path_factory.mktemp("hub")
    sizes = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name in ("roberta-base",):
        RobertaConfig(**sizes, intermediate_size=32).save_pretrained(folder / name)
    for name in ("xlm-roberta-base", "xlm-roberta-large"):
        XLMRobertaConfig(**sizes, intermediate_size=32).save_pretrained(folder / name)
    for name in ("google/mt5-base", "google/mt5-xl"):
        MT5Config(vocab_size=100, d_model=16, num_layers=1).save_pretrained(folder / name)
    for name in ("facebook/nllb-200-distilled-600M", "facebook/nllb-200-distilled-1.3B"):
        M2M100Config(vocab_size=100, d_model=16, encoder_layers=1).save_pretrained(folder / name)
    return folder


def built(sections: dict, tokens: Tokens) -> Clip:
    image = SimpleNamespace(image=Image(**sections["data"]["image"]))
    return build_clip(SimpleNamespace(model=Model(**sections["model"]), data=image), tokens)


def shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: [size for size in value.shape if size != 1] for name, value in state.items()}


@pytest.mark.parametrize("name", ALL)
def test_every_configuration_maps_or_is_refused(
    name: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hub)
    config = get_model_config(name)
    reasons = [reason for pattern, reason in REFUSED.items() if re.fullmatch(pattern, name)]
    if reasons:
        with pytest.raises(UserError, match=reasons[0]):
            sections_of(config, {}, tmp_path)
        return
    sections = sections_of(config, {}, tmp_path)
    Loss(**sections["loss"])
    text = Text(**sections["data"]["text"])
    hf = "hf_model_name" in config["text_cfg"]
    tokens = Tokens(100 if hf else config["text_cfg"]["vocab_size"], text.context_length)
    kind = CustomTextCLIP if config.pop("custom_text", False) or hf else CLIP
    config["text_cfg"]["hf_model_pretrained"] = False
    with torch.device("meta"):
        ours, theirs = built(sections, tokens), kind(**config)
    own = {key: value for key, value in ours.state_dict().items() if not key.endswith("num_batches_tracked")}
    found = LAYOUTS["model"][0].convert(theirs.state_dict(), ours)
    found = {key: value for key, value in found.items() if not key.endswith("num_batches_tracked")}
    assert shapes(found) == shapes(own)
    assert (ours.logit_bias is None) == (theirs.logit_bias is None)
    assert (
        sections["data"]["image"]["size"] == theirs.visual.image_size
        or theirs.visual.image_size == (sections["data"]["image"]["size"],) * 2
    )


VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual_cfg": {}}, r"model_cfg: unknown key visual_cfg; known are embed_dim, vision_cfg"),
        ({"embed_dim": None}, r"model_cfg\.embed_dim: None has no counterpart here; allowed: a whole number"),
        ({"text_cfg": None}, r"model_cfg\.text_cfg: None; expected a section"),
        (
            {"vision_cfg": {"qk_norm": True}},
            r"vision_cfg\.qk_norm: True has no counterpart here; allowed: False",
        ),
        ({"vision_cfg": {"image_size": [32, 64]}}, r"vision_cfg\.image_size: \[32, 64\] .*images are square"),
        (
            {"vision_cfg": {"layers": [1, 1, 1, 1]}},
            r"vision_cfg\.layers: .* OpenAI's ResNets \(\[3, 4, 6, 3\] with",
        ),
        (
            {"vision_cfg": {"timm_model_name": "convnext_nano2"}},
            r"timm_model_name: 'convnext_nano2' .* of timm 1",
        ),
        (
            {"vision_cfg": {"timm_model_name": "resnet18", "timm_pool": "rot_attn"}},
            r"vision_cfg\.timm_pool: 'rot_attn'",
        ),
        (  # Built with the mean of its tokens it has a norm that one which is given it later has not.
            {
                "vision_cfg": {
                    "timm_model_name": "vit_tiny_patch16_224",
                    "timm_pool": "avg",
                    "image_size": 224,
                }
            },
            r"vision_cfg\.timm_model_name: .*norm\.weight, norm\.bias, fc_norm\.weight, fc_norm\.bias differ",
        ),
        (
            {"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": ""}},
            r"it is for images of 224 pixels, and image_size is 32",
        ),
        ({"vision_cfg": {"width": "x"}}, r"vision_cfg\.width: 'x' .*allowed: a whole number\."),
        ({"vision_cfg": {"layers": [[1]]}}, r"vision_cfg\.layers: \[\[1\]\] .*allowed: numbers of at most"),
        ({"vision_cfg": {"head_width": 0}}, r"vision_cfg\.head_width: 0 .*a number above zero"),
        ({"vision_cfg": {"patch_dropout": 2}}, r"vision_cfg\.patch_dropout: 2 .*a fraction below 1"),
        ({"vision_cfg": {"timm_model_name": ["x"]}}, r"timm_model_name: \['x'\] .*allowed: text\."),
        ({"text_cfg": {"norm_kwargs": []}}, r"text_cfg\.norm_kwargs: \[\] .*allowed: a section\."),
        ({"init_logit_scale": 1e6}, r"model_cfg\.init_logit_scale: 1000000.0 .*at most 100"),
        ({"init_logit_bias": math.nan}, r"model_cfg\.init_logit_bias: nan .*numbers of at most"),
        ({"text_cfg": {"embed_cls": True}}, r"text_cfg\.embed_cls: True"),
        (
            {"text_cfg": {"pool_type": "none"}},
            r"text_cfg\.pool_type: 'none' .*allowed: argmax, eos, first, last",
        ),
        ({"text_cfg": {"act_kwargs": {"approximate": "tanh"}}, "quick_gelu": True}, r"text_cfg\.act_kwargs"),
        ({"text_cfg": {"norm_kwargs": {"bias": False}}}, r"text_cfg\.norm_kwargs: .*allowed: \{'eps'"),
        (
            {"text_cfg": {"tokenizer_kwargs": {"strip_sep_token": True}}},
            r"text_cfg\.tokenizer_kwargs: .*clean",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused_by_key(tmp_path: Path, changes: dict, message: str) -> None:
    config = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) and key in config else value
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(UserError, match=message) as error:
        recipe_of(tmp_path)
    assert str(error.value).startswith(str(tmp_path / CONFIG))


ODD = (None, True, -1, 0, 10**400, math.inf, math.nan, "x", [], [[1]], [None], {}, {"a": 1})
TOWERS = {
    "own": {"vision_cfg": VISION, "text_cfg": TEXT},
    "timm": {
        "vision_cfg": {"timm_model_name": "test_convnext", "image_size": 32, "timm_pool": ""},
        "text_cfg": TEXT,
    },
}


EVERY = (("own", 1), ("timm", 31))


def odd_values(towers: str) -> Iterator[dict[str, Any]]:
    """Every key of a configuration with every odd value."""
    config = {"model_cfg": {"embed_dim": 8, **TOWERS[towers]}, "preprocess_cfg": {}}
    tables = {"model_cfg": folders._MODEL, "preprocess_cfg": folders._PREPROCESS}
    tables |= {"vision_cfg": folders._VISION, "text_cfg": folders._TEXT}
    for name, table in tables.items():
        for key, value in product(table, ODD):
            changed = deepcopy(config)
            (changed if name in changed else changed["model_cfg"])[name][key] = value
            yield changed


@pytest.mark.parametrize(
    ("towers", "every"), [("own", 7), *(pytest.param(*each, marks=pytest.mark.long) for each in EVERY)]
)
def test_odd_values_are_refused_and_nothing_else_happens(towers: str, every: int, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / VOCABULARY).touch()
    tried = refused = 0
    for document in islice(odd_values(towers), 0, None, every):
        (folder / CONFIG).write_text(json.dumps(document))
        tried += 1
        try:
            sections = recipe_of(folder)
        except UserError:
            refused += 1
            continue
        for key, kind in (("image", Image), ("text", Text)):
            with suppress(ValidationError):  # a message with its key, once it is a recipe
                kind(**sections["data"][key])
    assert refused > tried / 5


def test_a_folder_that_holds_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"open_clip_config\.json cannot be read"):
        recipe_of(tmp_path)
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(UserError, match="holds no section model_cfg"):
        recipe_of(tmp_path)


def test_pixels_and_captions_as_the_folder_says(tmp_path: Path) -> None:
    (tmp_path / VOCABULARY).touch()
    config = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}
    pixels = {
        "mean": 0.5,
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "resize_mode": "squash",
        "size": 7,
    }
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))
    found = recipe_of(tmp_path)
    image = Image(**found["data"]["image"])
    assert (image.size, image.mean, image.std) == (32, (0.5, 0.5, 0.5), (0.4, 0.5, 0.6))
    assert (image.interpolation, image.evaluation.resize) == ("bilinear", "squash")
    assert found["data"]["text"] == {"tokenizer": str(tmp_path / VOCABULARY), "context_length": 16}
    assert found["model"]["weights"] == str(tmp_path)
    with pytest.raises(
        UserError, match=r"preprocess_cfg\.resize_mode: 'longest' .*allowed: shortest, squash"
    ):
        sections_of(config, {"resize_mode": "longest"}, tmp_path)
    words = {**TEXT, "hf_tokenizer_name": "some/words", "tokenizer_kwargs": {"clean": "canonicalize"}}
    found = sections_of({**config, "text_cfg": words}, {}, tmp_path)
    assert found["data"]["text"] == {
        "tokenizer": str(tmp_path),
        "context_length": 16,
        "clean": "canonicalize",
    }


OWN = ("ViT-B-32", "ViT-M-16-alt", "ViT-B-32-quickgelu", "ViT-g-14")


@pytest.mark.parametrize("name", [OWN[1], *(pytest.param(name, marks=pytest.mark.long) for name in OWN)])
def test_openclips_own_vits_are_written_as_they_were_read(name: str, tmp_path: Path) -> None:
    config = get_model_config(name)
    sections = sections_of(config, {}, tmp_path)
    tokens = Tokens(config["text_cfg"]["vocab_size"], config["text_cfg"]["context_length"])
    with torch.device("meta"):
        model = built(sections, tokens)
    from clipcluster.data.tokenizer import ClipTokenizer

    tokenizer = ClipTokenizer([], tokens.context_length)
    recipe = SimpleNamespace(
        model=Model(**sections["model"]),
        data=SimpleNamespace(image=Image(**sections["data"]["image"]), text=Text(**sections["data"]["text"])),
    )
    written = config_of(recipe, model, tokenizer)["model_cfg"]
    assert written["vision_cfg"].pop("mlp_ratio", 4.0) == pytest.approx(
        config["vision_cfg"].pop("mlp_ratio", 4.0)
    )
    assert written == config
    with torch.device("meta"):
        theirs = CLIP(**get_model_config(name)).state_dict()
    found = as_open_clip(model, written)
    assert {key: value.shape for key, value in found.items()} == {key: v.shape for key, v in theirs.items()}
