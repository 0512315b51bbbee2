"""A dual encoder's recipe as OpenCLIP's configuration: what `open_clip_config.json` says.

`clipcluster.build.open_clip_folder` is the way back, and has the keys, defaults and versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from clipcluster.build.open_clip_folder import (
    HEAD_WIDTH,
    HF_POOLS,
    HF_TYPES,
    difference_of,
    their_trunk,
)
from clipcluster.data.tokenizer import ClipTokenizer, Tokenizer
from clipcluster.errors import UserError
from clipcluster.model.clip_text import ClipTextTower
from clipcluster.model.towers import HfImageTower
from clipcluster.recipe.sections.model import ClipTextTower as ClipTextSection
from clipcluster.recipe.sections.model import TimmImageTower
from clipcluster.recipe.sections.recipe import Recipe


def config_of(recipe: Recipe, model: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """The document of `open_clip_config.json` for a dual encoder: `model_cfg` and `preprocess_cfg`.

    model: the recipe's, of `clipcluster.model.clip.Clip`. `hf_model_name` and `hf_tokenizer_name` are the
    recipe's own names. Raises UserError, by key, for what OpenCLIP has not.
    """
    if recipe.model.dual is not None or isinstance(model.image, HfImageTower):
        key = "model.dual" if recipe.model.dual is not None else "model.image.hf"
        raise UserError(
            f"{key}: a network of transformers, and OpenCLIP's image towers are timm's and its own: name a "
            "tower in model.image.timm, or choose --format hf."
        )
    if recipe.data.image.evaluation.crop_pct != 1:
        raise UserError(
            f"data.image.evaluation.crop_pct: {recipe.data.image.evaluation.crop_pct:g}, and OpenCLIP crops "
            "nothing but the longer side (1.0)."
        )
    text, text_quick = _text_cfg(recipe, model.text, tokenizer)
    vision, image_quick = _vision_cfg(recipe, model, text_quick)
    found: dict[str, Any] = {"embed_dim": model.embed_dim}
    if (image_quick if text_quick is None else text_quick) is True:
        found["quick_gelu"] = True
    if "timm_model_name" in vision or "hf_model_name" in text:
        found["custom_text"] = True
    if model.logit_bias is not None:
        found["init_logit_bias"] = recipe.model.logit_bias.init if recipe.model.logit_bias else 0.0
    image = recipe.data.image
    preprocess = {
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": image.interpolation,
        "resize_mode": image.evaluation.resize,
    }
    return {"model_cfg": {**found, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": preprocess}


def _vision_cfg(recipe: Recipe, model: Any, text_quick: bool | None) -> tuple[dict[str, Any], bool | None]:
    """`vision_cfg`, and whether it needs quick_gelu to be set, or unset; None where it does not matter.

    OpenCLIP's own ViT where the network is one and the text tower has the same activation; else timm's.
    """
    trunk, image, size = model.image.trunk, recipe.model.image, recipe.data.image.size
    assert isinstance(image, TimmImageTower)
    bare = recipe.model.projections.image == "linear" and "image" not in recipe.model.projection_bias
    quick = _quick_of_own_vit(trunk)
    own = bare and quick is not None and text_quick in (None, quick)
    vision = _own_vit(trunk, size, image.args) if own else _timm_cfg(recipe, trunk, image, size)
    if image.mask_ratio:
        vision["patch_dropout"] = image.mask_ratio
    return vision, quick if own else None


_BLOCK = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def _quick_of_own_vit(trunk: Any) -> bool | None:
    """Whether a network of timm's that is OpenCLIP's own ViT has quick GELU; None for any other network."""
    if type(trunk) is not VisionTransformer or trunk.global_pool != "token":
        return None
    state, numbers = trunk.state_dict(), range(len(trunk.blocks))
    layers = ["norm_pre", "norm", *(f"blocks.{number}.{name}" for number in numbers for name in _BLOCK)]
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    names |= {"cls_token", "pos_embed", "patch_embed.proj.weight"}
    scales = {f"blocks.{number}.{name}.gamma" for number in numbers for name in ("ls1", "ls2")}
    same = (
        state.keys() in (names, names | scales)
        and state["pos_embed"].shape[1] == trunk.patch_embed.num_patches + 1
        and trunk.norm.eps == 1e-5
    )
    first: Any = trunk.blocks[0]
    act = first.mlp.act
    if same and isinstance(act, QuickGELU):
        return True
    return False if same and type(act) is nn.GELU and act.approximate == "none" else None


def _own_vit(trunk: Any, size: int, args: Mapping[str, Any]) -> dict[str, Any]:
    width, first = trunk.embed_dim, trunk.blocks[0]
    found = {
        "image_size": size,
        "layers": len(trunk.blocks),
        "width": width,
        "head_width": width // first.attn.num_heads,
        "patch_size": trunk.patch_embed.patch_size[0],
    }
    hidden = first.mlp.fc1.out_features
    if hidden != 4 * width:
        exact = args.get("mlp_ratio", hidden / width)
        found["mlp_ratio"] = exact if int(width * exact) == hidden else (hidden + 0.5) / width
    if "blocks.0.ls1.gamma" in trunk.state_dict():
        found["ls_init_value"] = args.get("init_values", 1e-5)
    return found if found["head_width"] != HEAD_WIDTH else _without(found, "head_width")


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


# Of timm's arguments those that OpenCLIP passes on, and those of training alone.
_PASSED = {"drop_path_rate", "global_pool"}
_OF_TRAINING = {"drop_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate"}


def _timm_cfg(recipe: Recipe, trunk: Any, image: TimmImageTower, size: int) -> dict[str, Any]:
    unknown = sorted(image.args.keys() - _PASSED - _OF_TRAINING)
    if unknown:
        raise UserError(
            f"model.image.args.{unknown[0]}: {image.args[unknown[0]]}, but OpenCLIP builds {image.timm} as "
            f"timm does by its name; allowed are {', '.join(sorted(_PASSED | _OF_TRAINING))}."
        )
    kind, biased = recipe.model.projections.image, "image" in recipe.model.projection_bias
    pool = image.args.get("global_pool", getattr(trunk, "global_pool", "") if kind == "none" else "")
    forms = [kind] if kind != "linear" or not pool or not biased else ["linear", ""]
    for proj in forms:  # "": the network's classifier, built with the pooling, not given it afterwards
        difference = difference_of(their_trunk(image.timm, pool, proj, recipe.model.embed_dim), trunk, size)
        if not difference and (proj != "linear" or trunk.num_features == _width_of(trunk)):
            break
    else:
        raise UserError(
            f"model.image.timm: OpenCLIP builds {image.timm} otherwise than it was trained: "
            f"{difference or 'its vectors have another width'}; choose --format safetensors or onnx."
        )
    found = {"timm_model_name": image.timm, "timm_pool": pool, "timm_proj": proj, "image_size": size}
    if biased and proj in ("linear", "mlp"):
        found["timm_proj_bias"] = True
    if image.args.get("drop_path_rate"):
        found["timm_drop_path"] = image.args["drop_path_rate"]
    return found


def _width_of(trunk: Any) -> int:
    return int(getattr(trunk, "head_hidden_size", None) or trunk.num_features)


def _text_cfg(recipe: Recipe, tower: Any, tokenizer: Tokenizer) -> tuple[dict[str, Any], bool | None]:
    """`text_cfg`, and whether it needs quick_gelu to be set, or unset; None where it does not matter."""
    own_bpe = isinstance(tokenizer, ClipTokenizer)
    found: dict[str, Any] = {"context_length": tokenizer.context_length}
    clean = getattr(tokenizer, "clean", "none")
    if not own_bpe:
        found["hf_tokenizer_name"] = recipe.data.text.tokenizer
    if clean not in ("none", "lower" if own_bpe else "whitespace"):
        found["tokenizer_kwargs"] = {"clean": clean}
    if isinstance(tower, ClipTextTower):
        return {**found, **_own_text(recipe, tower, tokenizer)}, _clip_section(recipe).quick_gelu
    return {**found, **_hf_cfg(recipe, tower, tokenizer)}, None


def _clip_section(recipe: Recipe) -> Any:
    text = recipe.model.text
    assert isinstance(text, ClipTextSection)
    return text.clip


def _own_text(recipe: Recipe, tower: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    clip, projection = _clip_section(recipe), recipe.model.projections.text
    if projection == "mlp":
        raise UserError(
            "model.projections.text: mlp, and OpenCLIP has one only after towers of transformers; allowed "
            "with model.text.clip: linear, none."
        )
    found = {
        "vocab_size": tower.token_embedding.num_embeddings,
        "width": clip.width,
        "heads": clip.heads,
        "layers": clip.layers,
    }
    changed = {
        "mlp_ratio": (clip.mlp_ratio, 4.0),
        "no_causal_mask": (not clip.causal, False),
        "proj_type": (projection, "linear"),
        "proj_bias": ("text" in recipe.model.projection_bias, False),
        "norm_kwargs": ({"eps": clip.norm_eps}, {"eps": 1e-5}),
        "act_kwargs": ({"approximate": "tanh"} if clip.tanh_gelu else None, None),
    }
    found |= {key: value for key, (value, default) in changed.items() if value != default}
    if clip.pool != "last":
        return {**found, "pool_type": {"last_position": "last", "first": "first"}[clip.pool]}
    if isinstance(tokenizer, ClipTokenizer):  # its end token has the largest id, which is OpenCLIP's default
        return found
    return {**found, "pool_type": "eos", "eos_id": tokenizer.eos_id}


def _hf_cfg(recipe: Recipe, tower: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    settings, section = tower.transformer.config, recipe.model.text
    if settings.model_type not in HF_TYPES:
        raise UserError(
            f"model.text: {settings.model_type}, and OpenCLIP takes of transformers {', '.join(HF_TYPES)} "
            "alone; choose --format safetensors or onnx, or hf where it takes the image tower."
        )
    poolers = {ours: theirs for theirs, ours in HF_POOLS.items()}
    if tower.pool not in poolers:
        raise UserError(
            f"model.text.pool: {tower.pool}, and OpenCLIP pools a tower of transformers by "
            f"{', '.join(poolers)}; choose --format safetensors or onnx."
        )
    if "text" in recipe.model.projection_bias:
        raise UserError(
            "model.projection_bias: text, and OpenCLIP's projection of a tower of transformers has none; "
            "remove it."
        )
    if settings.pad_token_id != tokenizer.pad_id:
        raise UserError(
            f"data.text.tokenizer: it pads with token {tokenizer.pad_id}, and OpenCLIP attends to all tokens "
            f"but the configuration's pad_token_id {settings.pad_token_id}; choose --format hf or "
            "onnx."
        )
    kinds = {"linear": "linear", "mlp": "mlp", "none": None}
    return {
        "hf_model_name": getattr(section, "hf", settings.model_type),
        "hf_pooler_type": poolers[tower.pool],
        "hf_proj_type": kinds[recipe.model.projections.text],
    }
