"""A model folder of OpenCLIP as the recipe that builds it and feeds it: what `open_clip_config.json` says.

Keys and defaults are those of open_clip 3.3.0 (CLIPVisionCfg, CLIPTextCfg, PreprocessCfg). A key without a
counterpart here is refused, unless it has the value that changes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from clipcluster.data.tokenizer import ClipTokenizer
from clipcluster.errors import UserError
from clipcluster.model.hugging_face import config_of, refusing
from clipcluster.model.layouts import classifier_of
from clipcluster.model.towers import build_image_tower
from clipcluster.model.weight_files import some
from clipcluster.recipe.sections.model import ClipTextTower as ClipTextSection
from clipcluster.recipe.sections.model import TimmImageTower
from clipcluster.recipe.sections.values import DEVIATIONS, MEANS

CONFIG = "open_clip_config.json"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
"""CLIP's vocabulary, as OpenAI and OpenCLIP name it."""
HEAD_WIDTH = 64
"""Of an attention head of OpenCLIP's ViT, where the configuration names none."""

_BLOCKS = {
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
_MODEL = {
    "embed_dim": None,
    "vision_cfg": None,
    "text_cfg": None,
    "multimodal_cfg": None,
    "quick_gelu": False,
    "custom_text": False,
    "init_logit_scale": math.log(1 / 0.07),
    "init_logit_bias": None,
    "nonscalar_logit_scale": False,
    "output_dict": False,
}
_TIMM = {
    "timm_model_name": None,
    "timm_model_pretrained": False,
    "timm_pool": "avg",
    "timm_proj": "linear",
    "timm_proj_bias": False,
    "timm_drop": 0.0,
    "timm_drop_path": None,
}
_VISION = {
    "image_size": 224,
    "patch_dropout": 0.0,
    "layers": 12,
    "width": 768,
    "head_width": HEAD_WIDTH,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "ls_init_value": None,
    "attentional_pool": False,
    "attn_pooler_queries": 256,
    "attn_pooler_heads": 8,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "output_tokens": False,
    "act_kwargs": None,
    "norm_kwargs": None,
    **_BLOCKS,
    **_TIMM,
}
_HF = {
    "hf_model_name": None,
    "hf_model_pretrained": True,
    "hf_proj_type": "mlp",
    "hf_pooler_type": "mean_pooler",
}
_TEXT = {
    "context_length": 77,
    "vocab_size": ClipTokenizer.vocab_size,
    "hf_tokenizer_name": None,
    "tokenizer_mode": None,
    "tokenizer_kwargs": None,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
    "ls_init_value": None,
    "embed_cls": False,
    "pad_id": 0,
    "eos_id": 2,
    "no_causal_mask": False,
    "final_ln_after_pool": False,
    "pool_type": "argmax",
    "proj_bias": False,
    "proj_type": "linear",
    "output_tokens": False,
    "act_kwargs": None,
    "norm_kwargs": None,
    **_BLOCKS,
    **_HF,
}
_PREPROCESS = {
    "size": None,
    "mode": "RGB",
    "mean": MEANS["openai"],
    "std": DEVIATIONS["openai"],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}

_VIT = "vit_base_patch16_clip"
_VIT_SIZES = {
    "patch_size": 16,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "init_values": None,
}
_RESNETS = {
    ((3, 4, 6, 3), 64): "resnet50_clip",
    ((3, 4, 23, 3), 64): "resnet101_clip",
    ((4, 6, 10, 6), 80): "resnet50x4_clip",
    ((6, 8, 18, 8), 96): "resnet50x16_clip",
    ((3, 15, 36, 10), 128): "resnet50x64_clip",
}
"""OpenCLIP's ModifiedResNets in timm, by layers and width."""
_TEXT_POOLS = {"argmax": "last", "eos": "last", "first": "first", "last": "last_position"}
HF_POOLS = {"mean_pooler": "mean", "cls_pooler": "pooler", "cls_last_hidden_state_pooler": "first"}
"""OpenCLIP's poolings of a text tower of transformers -> those here."""
HF_TYPES = ("roberta", "xlm-roberta", "bert")
"""The text towers of transformers that both know, by model type."""


_NUMBER = (int, float)
_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("act_kwargs", "norm_kwargs", "tokenizer_kwargs"), (dict,)),
    **dict.fromkeys(("timm_model_name", "timm_proj", "hf_model_name", "hf_proj_type"), (str,)),
    **dict.fromkeys(("hf_tokenizer_name", "tokenizer_mode"), (str,)),
    **dict.fromkeys(("ls_init_value", "timm_drop_path", "init_logit_bias"), _NUMBER),
    **dict.fromkeys(("image_size", "patch_size", "layers"), (int, list)),
    **dict.fromkeys(("mean", "std"), (*_NUMBER, list, tuple)),
}
"""Of values whose default does not tell; any of the first three lines may be null."""
_WORDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a fraction",
    str: "text",
    dict: "a section",
    list: "a list of numbers",
}
_LARGEST, _LARGEST_SCALE = 1e9, 100


class _Part:
    """A section of a configuration, which notes the keys that are read."""

    def __init__(self, name: str, given: Any, defaults: Mapping[str, Any]) -> None:
        if not isinstance(given, Mapping):
            raise UserError(f"{name}: {given!r}; expected a section.")
        unknown = [key for key in given if key not in defaults]
        if unknown:
            raise UserError(f"{name}: unknown key {some(unknown)}; known are {', '.join(defaults)}.")
        self.name, self.given, self.defaults = name, given, defaults
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        """The value of a key. Raises UserError where it is of another type than OpenCLIP's."""
        self.read.add(key)
        value, default = self.given.get(key, self.defaults[key]), self.defaults[key]
        types = _TYPES.get(key, _NUMBER if isinstance(default, float) else (type(default),))
        if value is default or (key not in _TYPES and default is None):
            return value
        if value is None and key in ("timm_proj", "hf_proj_type"):
            return value
        numbers = value if isinstance(value, (list, tuple)) else [value] if types[0] is int else []
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise self.refuse(key, " or ".join(_WORDS[each] for each in _WORDS if each in types))
        if not all(type(number) in _NUMBER and abs(number) <= _LARGEST for number in numbers):
            raise self.refuse(key, f"numbers of at most {_LARGEST:g}")
        return value

    def refuse(self, key: str, allowed: str) -> UserError:
        """The error of a key's value."""
        value = self.given.get(key, self.defaults[key])
        return UserError(f"{self.name}.{key}: {value!r} has no counterpart here; allowed: {allowed}.")

    def check_rest(self, idle: Collection[str] = ()) -> None:
        """UserError where a key was not read, is not `idle`, and has not its default."""
        for key in self.given.keys() - self.read - {*idle}:
            if self.given[key] != self.defaults[key]:
                raise self.refuse(key, repr(self.defaults[key]))

    def square(self, key: str) -> int:
        """A size in pixels, or a pair of equal ones."""
        value = self[key]
        sides = set(value) if isinstance(value, (list, tuple)) else {value}
        if len(sides) != 1 or not all(isinstance(side, int) for side in sides):
            raise self.refuse(key, "one number of pixels: images are square")
        return int(sides.pop())


def recipe_of(folder: Path) -> dict[str, Any]:
    """A model folder of OpenCLIP's as sections of a recipe: `model` with its weights, `data`, `loss`.

    The folder holds `open_clip_config.json`, the weights (open_clip_model.safetensors or
    open_clip_pytorch_model.bin) and, where the configuration names a tokenizer of Hugging Face's, its files;
    else CLIP's vocabulary is taken from the folder or from an installed open_clip.

    Raises UserError where the configuration cannot be read, or names what no recipe can.
    """
    file = folder / CONFIG
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
    if not isinstance(document, dict) or not isinstance(document.get("model_cfg"), dict):
        raise UserError(f"{file} holds no section model_cfg; expected what OpenCLIP saves with a model.")
    try:
        sections = sections_of(document["model_cfg"], document.get("preprocess_cfg") or {}, folder)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    sections["model"]["weights"] = str(folder)
    return sections


def sections_of(
    model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """The sections of a recipe for a configuration, without weights. Raises UserError as `recipe_of`.

    folder: where the tokenizer's files are looked for, and the `config.json` of a tower of transformers.
    """
    whole = _Part("model_cfg", model_cfg, _MODEL)
    if whole["multimodal_cfg"] is not None:
        raise UserError(
            "model_cfg.multimodal_cfg: a generative text decoder (CoCa) has no counterpart here; allowed: "
            "models of an image tower and a text tower."
        )
    vision = _Part("model_cfg.vision_cfg", whole["vision_cfg"], _VISION)
    text = _Part("model_cfg.text_cfg", whole["text_cfg"], _TEXT)
    quick, embed_dim = bool(whole["quick_gelu"]), whole["embed_dim"]
    if not isinstance(embed_dim, int):
        raise whole.refuse("embed_dim", "a whole number")
    image_tower, image_projection, image_bias = _image(vision, quick, embed_dim)
    text_tower, text_projection, text_bias = _text(text, quick, folder)
    model: dict[str, Any] = {"image": image_tower, "text": text_tower, "embed_dim": embed_dim}
    biased = [name for name, bias in (("image", image_bias), ("text", text_bias)) if bias]
    if biased:
        model["projection_bias"] = biased
    if (image_projection, text_projection) != ("linear", "linear"):
        model["projections"] = {"image": image_projection, "text": text_projection}
    scale, bias = whole["init_logit_scale"], whole["init_logit_bias"]
    if scale > _LARGEST_SCALE:
        raise whole.refuse("init_logit_scale", f"a logarithm of at most {_LARGEST_SCALE}")
    if bias is not None:
        model["logit_bias"] = {"init": float(bias)}
    if bias is not None or not math.isclose(scale, _MODEL["init_logit_scale"]):  # type: ignore[arg-type]
        model["logit_scale"] = {"init": math.exp(scale), "max": None}
    whole.check_rest(idle=("custom_text", "nonscalar_logit_scale", "output_dict"))
    images = _preprocessing(_Part("preprocess_cfg", preprocess_cfg, _PREPROCESS), vision.square("image_size"))
    return {
        "model": model,
        "data": {"image": images, "text": _tokenization(text, folder)},
        "loss": {"name": "clip" if bias is None else "siglip"},
    }


_Tower = tuple[dict[str, Any], str, bool]
"""The section of a tower, its kind of projection, and whether that has a bias."""


def _image(vision: _Part, quick: bool, embed_dim: int) -> _Tower:
    if vision["timm_model_name"]:
        return _timm(vision, embed_dim)
    if isinstance(vision["layers"], (list, tuple)):
        return _resnet(vision)
    if vision["head_width"] < 1:
        raise vision.refuse("head_width", "a number above zero")
    sizes = {
        "patch_size": vision.square("patch_size"),
        "embed_dim": vision["width"],
        "depth": vision["layers"],
        "num_heads": vision["width"] // vision["head_width"],
        "mlp_ratio": vision["mlp_ratio"],
        "init_values": vision["ls_init_value"],
    }
    args = {key: value for key, value in sizes.items() if value != _VIT_SIZES[key]}
    section: dict[str, Any] = {"timm": f"{_VIT}_quickgelu_224" if quick else f"{_VIT}_224"}
    section |= ({"args": args} if args else {}) | _masking(vision)
    vision.square("image_size")
    # Of the class token alone the norm is the same before and after pooling.
    vision.check_rest(idle=(*_TIMM, "attn_pooler_queries", "attn_pooler_heads", "final_ln_after_pool"))
    return section, "linear", False


def _masking(vision: _Part) -> dict[str, Any]:
    ratio = vision["patch_dropout"]
    if not 0 <= ratio < 1:
        raise vision.refuse("patch_dropout", "a fraction below 1")
    return {"mask_ratio": ratio} if ratio else {}


def _resnet(vision: _Part) -> _Tower:
    known = (tuple(vision["layers"]), vision["width"])
    if known not in _RESNETS:
        shown = ", ".join(f"{[*layers]} with width {width}" for layers, width in _RESNETS)
        raise vision.refuse("layers", f"those of OpenAI's ResNets ({shown})")
    vision.square("image_size")
    vision.check_rest(idle=(*_TIMM, "patch_size", "mlp_ratio", "attn_pooler_queries", "attn_pooler_heads"))
    return {"timm": _RESNETS[known]}, "linear", True


def _timm(vision: _Part, embed_dim: int) -> _Tower:
    name, pool, proj = vision["timm_model_name"], vision["timm_pool"], vision["timm_proj"] or ""
    if not timm.is_model(name):
        raise vision.refuse("timm_model_name", f"the networks of timm {timm.__version__}")
    if proj not in ("", "linear", "mlp", "none"):
        raise vision.refuse("timm_proj", "linear, mlp, none, ''")
    if pool in ("abs_attn", "rot_attn"):
        raise vision.refuse("timm_pool", "'' and the poolings of timm's own networks")
    args = {"global_pool": pool} if pool else {}
    if vision["timm_drop_path"]:
        args["drop_path_rate"] = vision["timm_drop_path"]
    section: dict[str, Any] = {"timm": name} | ({"args": args} if args else {}) | _masking(vision)
    theirs = their_trunk(name, pool, proj, embed_dim)
    with torch.device("meta"):
        ours, _ = build_image_tower(TimmImageTower(**section), image_size=vision.square("image_size"))
    difference = difference_of(theirs, ours.trunk, vision.square("image_size"))
    if difference:
        raise vision.refuse(
            "timm_model_name", f"networks that OpenCLIP builds as timm does: here {difference}"
        )
    biased = bool(vision["timm_proj_bias"])
    if not proj:  # the network's own classifier is the projection
        biased = f"{classifier_of(theirs)}.bias" in theirs.state_dict()
    vision.check_rest(idle=_VISION.keys() - {"output_tokens", "timm_drop"})
    return section, {"": "linear", "none": "none"}.get(proj, proj), biased and proj != "none"


def their_trunk(name: str, pool: str, proj: str, embed_dim: int) -> nn.Module:
    """timm's network as OpenCLIP's TimmModel builds it, without values (meta device)."""
    with torch.device("meta"), refusing(f"timm cannot build {name} with pooling {pool!r}"):
        if proj in ("linear", "mlp"):
            trunk: Any = timm.create_model(name, pretrained=False)
            trunk.reset_classifier(0, **({"global_pool": pool} if pool else {}))
            return trunk
        classes = 0 if proj == "none" else embed_dim
        return timm.create_model(name, pretrained=False, num_classes=classes, global_pool=pool)


def difference_of(theirs: Any, ours: nn.Module, image_size: int) -> str:
    """What tells OpenCLIP's network of timm's from the one here, but for a classifier; "" for nothing."""
    built_for = getattr(getattr(theirs, "patch_embed", None), "img_size", None)
    if theirs.pretrained_cfg.get("fixed_input_size") and built_for and built_for[-1] != image_size:
        return f"it is for images of {built_for[-1]} pixels, and image_size is {image_size}"
    place = f"{classifier_of(theirs)}."
    shapes = [
        {name: tuple(value.shape) for name, value in network.state_dict().items()}
        for network in (theirs, ours)
    ]
    differing = [
        name
        for name in dict.fromkeys([*shapes[0], *shapes[1]])
        if shapes[0].get(name) != shapes[1].get(name) and not name.startswith(place)
    ]
    return f"{some(differing)} differ" if differing else ""


def _text(text: _Part, quick: bool, folder: Path) -> _Tower:
    if text["hf_model_name"]:
        return _hf_text(text, folder)
    norm, act = text["norm_kwargs"] or {}, text["act_kwargs"] or {}
    if norm.keys() - {"eps"}:
        raise text.refuse("norm_kwargs", "{'eps': a number}")
    if act not in ({}, {"approximate": "tanh"}) or (act and quick):
        raise text.refuse("act_kwargs", "none, or {'approximate': 'tanh'} without quick_gelu")
    if text["pool_type"] not in _TEXT_POOLS:
        raise text.refuse("pool_type", ", ".join(_TEXT_POOLS))
    if text["proj_type"] not in ("linear", "none"):
        raise text.refuse("proj_type", "linear, none")
    section = {
        "width": text["width"],
        "layers": text["layers"],
        "heads": text["heads"],
        "mlp_ratio": text["mlp_ratio"],
        "quick_gelu": quick,
        "tanh_gelu": bool(act),
        "causal": not text["no_causal_mask"],
        "pool": _TEXT_POOLS[text["pool_type"]],
        "norm_eps": norm.get("eps", 1e-5),
        "vocab_size": text["vocab_size"],
    }
    projected = text["proj_type"] == "linear"
    biased = bool(text["proj_bias"]) and projected
    _tokenization_keys(text)
    text.check_rest(idle=("context_length", "hf_tokenizer_name", "pad_id", "eos_id", *_HF))
    defaults = {**ClipTextSection(clip={}).clip.model_dump(), "vocab_size": ClipTokenizer.vocab_size}  # type: ignore[arg-type]
    if text["hf_tokenizer_name"]:
        defaults["vocab_size"] = None
    changed = {key: value for key, value in section.items() if value != defaults[key]}
    return {"clip": changed}, "linear" if projected else "none", biased


def _hf_text(text: _Part, folder: Path) -> _Tower:
    name = str(folder) if (folder / "config.json").is_file() else text["hf_model_name"]
    settings, _ = config_of("model_cfg.text_cfg.hf_model_name", name, None)
    if settings.model_type not in HF_TYPES:
        raise text.refuse("hf_model_name", f"{', '.join(HF_TYPES)}, and this is {settings.model_type}")
    if text["hf_pooler_type"] not in HF_POOLS:
        raise text.refuse("hf_pooler_type", ", ".join(HF_POOLS))
    projections = {"linear": "linear", "mlp": "mlp", None: "none"}
    if text["hf_proj_type"] not in projections:
        raise text.refuse("hf_proj_type", "linear, mlp, null")
    _tokenization_keys(text)
    text.check_rest(idle=_TEXT.keys() - {"output_tokens"})
    section = {"hf": name, "pool": HF_POOLS[text["hf_pooler_type"]]}
    return section, projections[text["hf_proj_type"]], False


def _tokenization_keys(text: _Part) -> dict[str, Any]:
    """The options of the tokenizer, all of which have to be known here."""
    options = dict(text["tokenizer_kwargs"] or {})
    if options.keys() - {"clean"}:
        raise text.refuse("tokenizer_kwargs", "{'clean': whitespace, lower or canonicalize}")
    if text["tokenizer_mode"]:
        raise text.refuse("tokenizer_mode", "null")
    return options


def _tokenization(text: _Part, folder: Path) -> dict[str, Any]:
    hf = bool(text["hf_tokenizer_name"])
    clean = _tokenization_keys(text).get("clean", "whitespace" if hf else "lower")
    found = {
        "tokenizer": str(folder) if hf else str(_vocabulary(folder)),
        "context_length": text["context_length"],
    }
    return found if clean == "lower" and not hf else {**found, "clean": clean}


def _vocabulary(folder: Path) -> Path:
    """CLIP's vocabulary: in the folder, or the installed open_clip's."""
    known = [folder / VOCABULARY, folder / "merges.txt"]
    installed = find_spec("open_clip")
    if installed is not None and installed.origin:
        known.append(Path(installed.origin).parent / VOCABULARY)
    for file in known:
        if file.is_file():
            return file
    raise UserError(
        f"model_cfg.text_cfg: without hf_tokenizer_name the tokenizer is CLIP's: put {VOCABULARY} (of "
        "OpenAI's or OpenCLIP's package) into the folder, or install open_clip_torch."
    )


def _preprocessing(given: _Part, image_size: int) -> dict[str, Any]:
    if given["resize_mode"] not in ("shortest", "squash"):
        raise given.refuse("resize_mode", "shortest, squash")
    if given["interpolation"] not in ("bicubic", "bilinear", "random"):
        raise given.refuse("interpolation", "bicubic, bilinear, random")
    mean, std = (
        [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)] * 3
        for value in (given["mean"], given["std"])
    )
    given.check_rest(idle=("size", "fill_color"))
    return {
        "size": image_size,
        "mean": mean,
        "std": std,
        "interpolation": given["interpolation"],
        "evaluation": {"resize": given["resize_mode"]},
    }
