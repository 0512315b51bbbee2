"""Conversion between the parameter names of other programs and those here.

A `Layout` recognises a state dict (prefixes removed) by one of its names and renames its tensors; shapes
that differ by dimensions of size one are reconciled in `clipcluster.model.weights`. `as_open_clip`,
`in_transformers` and `siglip_vit_in_transformers` are the inverse, for exports.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from timm.models import byobnet
from torch import Tensor, nn

from clipcluster.model.hugging_face import names_in

State = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """The parameter names of another program.

    name: for messages. mark: the prefix of a name that occurs in this layout alone. convert: (state dict with
    these names, module) -> state dict with the module's names.
    """

    name: str
    mark: str
    convert: Callable[[State, Any], State]

    def recognises(self, state: Iterable[str]) -> bool:
        """Whether a state dict with these names has this layout."""
        return any(key.startswith(self.mark) for key in state)


_CONVNEXT = [
    (re.compile(r"^downsample_layers\.0\."), "stem."),
    (re.compile(r"^downsample_layers\.(\d+)\.(\d+)"), r"stages.\1.downsample.\2"),
    (re.compile(r"^stages\.(\d+)\.(\d+)\."), r"stages.\1.blocks.\2."),
    (re.compile(r"\.dwconv\."), ".conv_dw."),
    (re.compile(r"\.pwconv([12])\."), r".mlp.fc\1."),
    (re.compile(r"\.grn\.gamma$"), ".mlp.grn.weight"),
    (re.compile(r"\.grn\.beta$"), ".mlp.grn.bias"),
    (re.compile(r"^head\."), "head.fc."),
    (re.compile(r"^norm\."), "head.norm."),
    # The sparse modules of FCMAE pre-training wrap a dense one.
    (re.compile(r"\.(?:ln|linear)\.(weight|bias)$"), r".\1"),
]


def _convnext(state: State, tower: nn.Module) -> State:
    """From the original ConvNeXt and ConvNeXt V2, FCMAE pre-training included, to timm's names."""
    found = {}
    for key, value in state.items():
        if key.endswith(".kernel"):
            key, value = f"{key.removesuffix('kernel')}weight", _dense(value)
        found[_renamed(key, _CONVNEXT)] = value
    return found


def _renamed(key: str, names: Iterable[tuple[re.Pattern[str], str]]) -> str:
    for pattern, name in names:
        key = pattern.sub(name, key)
    return key


def _dense(kernel: Tensor) -> Tensor:
    """A sparse convolution's kernel, (k * k, in, out) or depthwise (k * k, C), as a dense (out, in, k, k).

    weight[o, i, y, x] = kernel[x * k + y, i, o].
    """
    size = isqrt(len(kernel))
    if kernel.ndim == 2:
        kernel = kernel.unsqueeze(1)
    return kernel.permute(2, 1, 0).unflatten(2, (size, size)).transpose(2, 3)


# Parts of names for the same tensors in two programs, replaced one after another, in either direction. ^ and
# $ mark the beginning and the end of a name. OpenAI's and OpenCLIP's names are on the left.
_CLIP_VIT = (  # timm's
    ("^conv1.", "^patch_embed.proj."),
    ("^positional_embedding$", "^pos_embed$"),
    ("^class_embedding$", "^cls_token$"),
    ("^ln_pre.", "^norm_pre."),
    ("^ln_post.", "^norm."),
    ("^transformer.resblocks.", "^blocks."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".ls_1.", ".ls1."),
    (".ls_2.", ".ls2."),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
_CLIP_HF = (  # transformers', queries, keys and values apart
    ("^conv1.", "^embeddings.patch_embedding."),
    ("^class_embedding$", "^embeddings.class_embedding$"),
    ("^positional_embedding$", "^embeddings.position_embedding.weight$"),
    ("^token_embedding.", "^embeddings.token_embedding."),
    ("^ln_pre.", "^pre_layrnorm."),  # as transformers writes it
    ("^ln_post.", "^post_layernorm."),
    ("^ln_final.", "^final_layer_norm."),
    ("^transformer.resblocks.", "^encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.", ".self_attn."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
_SIGLIP_HF = (  # SigLIP's ViT: timm's on the left, transformers' on the right, queries, keys and values apart
    ("^patch_embed.proj.", "^embeddings.patch_embedding."),
    ("^pos_embed$", "^embeddings.position_embedding.weight$"),
    ("^blocks.", "^encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.proj.", ".self_attn.out_proj."),
    (".attn.", ".self_attn."),
    ("^norm.", "^post_layernorm."),
    ("^attn_pool.latent$", "^head.probe$"),
    ("^attn_pool.proj.", "^head.attention.out_proj."),
    ("^attn_pool.norm.", "^head.layernorm."),
    ("^attn_pool.mlp.", "^head.mlp."),
)
_IN_PROJ = re.compile(r"\.attn\.(?:in_proj_|Wqkv\.)(weight|bias)$")
_BERT_IN_PROJ = re.compile(r"\.attention\.self\.Wqkv\.(weight|bias)$")
_TIMM_QKV = re.compile(r"\.attn\.qkv\.(weight|bias)$")
_QKV = ("q_proj", "k_proj", "v_proj")


def _rules(pairs: Iterable[tuple[str, str]], *, back: bool = False) -> list[tuple[re.Pattern[str], str]]:
    """Substitutions that turn names on the left into those on the right; with `back` the reverse."""

    def pattern(text: str) -> re.Pattern[str]:
        return re.compile(re.escape(text).replace(r"\^", "^").replace(r"\$", "$"))

    ways = ((right, left) if back else (left, right) for left, right in pairs)
    return [(pattern(old), new.strip("^$")) for old, new in ways]


def _clip_vit(state: State, tower: nn.Module) -> State:
    """From OpenAI's and OpenCLIP's own ViT to timm's names, or transformers' for a tower of transformers."""
    if _of_transformers(tower):
        return clip_in_transformers(state)
    rules = _rules(_CLIP_VIT)
    found = {_renamed(_IN_PROJ.sub(r".attn.in_proj_\1", key), rules): v for key, v in state.items()}
    if "pos_embed" in found:
        found["pos_embed"] = found["pos_embed"].unsqueeze(0)
    return found


def clip_vit_of_timm(state: State) -> State:
    """timm's names of CLIP's ViT as OpenAI's and OpenCLIP's own: the inverse of `_clip_vit`."""
    rules = _rules(_CLIP_VIT, back=True)
    found = {_renamed(key, rules): value for key, value in state.items()}
    if "positional_embedding" in found:
        found["positional_embedding"] = found["positional_embedding"].squeeze(0)
    if "class_embedding" in found:
        found["class_embedding"] = found["class_embedding"].flatten()
    return found


def clip_in_transformers(state: State) -> State:
    """OpenAI's and OpenCLIP's names of an image or text encoder as those of CLIP in transformers."""
    rules = _rules(_CLIP_HF)
    return {_renamed(key, rules): value for key, value in _split(state, _IN_PROJ, ".attn", _QKV).items()}


def _clip_of_transformers(state: State) -> State:
    """transformers' names of CLIP as OpenAI's and OpenCLIP's: the inverse of `clip_in_transformers`."""
    rules = _rules(_CLIP_HF, back=True)
    return _joined({_renamed(key, rules): value for key, value in state.items()}, "in_proj_")


def _joined(state: State, name: str) -> State:
    """Queries, keys and values concatenated to one tensor called `name`; unchanged if one is missing."""
    found = dict(state)
    for key in state:
        block, apart, kind = key.rpartition(".q_proj.")
        names = [f"{block}.{each}.{kind}" for each in _QKV]
        if apart and len({state[each].shape if each in state else None for each in names}) == 1:
            found[f"{block}.{name}{kind}"] = torch.cat([found.pop(each) for each in names])
    return found


def siglip_vit_in_transformers(state: State) -> State:
    """timm's names of SigLIP's ViT as transformers'."""
    found = _split(state, _TIMM_QKV, ".attn", _QKV)
    for kind in ("weight", "bias"):
        parts = [found.pop(f"attn_pool.{name}.{kind}") for name in ("q", "kv")]
        found[f"head.attention.in_proj_{kind}"] = torch.cat(parts)
    found["pos_embed"] = found["pos_embed"].squeeze(0)
    rules = _rules(_SIGLIP_HF)
    return {_renamed(key, rules): value for key, value in found.items()}


def _siglip_vit_of_transformers(state: State) -> State:
    """transformers' names of SigLIP's ViT as timm's: the inverse of `siglip_vit_in_transformers`."""
    rules = _rules(_SIGLIP_HF, back=True)
    found = _joined({_renamed(key, rules): value for key, value in state.items()}, "qkv.")
    for kind in ("weight", "bias"):
        if f"head.attention.in_proj_{kind}" in found:
            query, *others = found.pop(f"head.attention.in_proj_{kind}").chunk(3)
            found |= {f"attn_pool.q.{kind}": query, f"attn_pool.kv.{kind}": torch.cat(others)}
    if "pos_embed" in found:
        found["pos_embed"] = found["pos_embed"].unsqueeze(0)
    return found


def _hf_tower(state: State, tower: Any) -> State:
    """From names in files of transformers to those of the tower, which is one of the installed transformers,
    timm's ViT of CLIP or SigLIP, or CLIP's text transformer.
    """
    if _of_transformers(tower):
        return {now: state[key] for key, now in names_in(tower, [*state]).items()}
    if "head.probe" in state:
        return _siglip_vit_of_transformers(state)
    names = _clip_of_transformers(state)
    return names if hasattr(tower, "token_embedding") else _clip_vit(names, tower)


def _split(state: State, pattern: re.Pattern[str], place: str, names: Iterable[str]) -> State:
    """The state dict with each tensor of queries, keys and values split into three."""
    found: State = {}
    for key, value in state.items():
        match = pattern.search(key)
        if match:
            block, parts = key[: match.start()], value.chunk(3)
            found |= {f"{block}{place}.{n}.{match[1]}": p for n, p in zip(names, parts, strict=True)}
        else:
            found[key] = value
    return found


def _of_transformers(tower: nn.Module) -> bool:
    return hasattr(tower, "config")


def _clip_resnet(state: State, tower: nn.Module) -> State:
    """From OpenAI's and OpenCLIP's ModifiedResNet to timm's names."""
    if not isinstance(tower, byobnet.ByobNet):
        return state
    return byobnet.checkpoint_filter_fn({f"visual.{key}": value for key, value in state.items()}, tower)


def _open_clip(state: State, model: Any) -> State:
    """From a whole model of OpenCLIP, OpenAI or Chinese-CLIP to `clipcluster.model.clip.Clip`'s names."""
    if not hasattr(model, "text"):  # a classifier: model.image.weights loads its tower
        return state
    image = {key.removeprefix("visual."): state[key] for key in state if key.startswith("visual.")}
    text = {key.removeprefix("text."): state[key] for key in state if not key.startswith("visual.")}
    found: State = {}
    if "proj" in image:
        found["image_projection.weight"] = image.pop("proj").T
    if "text_projection" in text:
        found["text_projection.weight"] = text.pop("text_projection").T
    trunk = model.image.trunk
    for part, pairs in ((image, _image_projections(image, trunk)), (text, _TEXT_PROJECTIONS)):
        for theirs, ours in pairs:
            for key in [key for key in part if key.startswith(theirs)]:
                found[ours + key.removeprefix(theirs)] = part.pop(key)
    found |= {key: text.pop(key) for key in ("logit_scale", "logit_bias", *SIZES) if key in text}
    if not any(key.startswith("trunk.") for key in image):
        layouts = (layout for layout in LAYOUTS["image"] if layout.recognises(image))
        image = next((layout.convert(image, trunk) for layout in layouts), image)
        image = {f"trunk.{key}": value for key, value in image.items()}
    found |= {f"image.{key}": value for key, value in image.items()}
    return found | {f"text.{key}": value for key, value in _text_of(text, model.text).items()}


# The projections that are layers in OpenCLIP's models; one that is a bare matrix is transposed.
_IMAGE_PROJECTIONS = (
    ("attnpool.c_proj.", "image_projection."),
    ("head.proj.", "image_projection."),
    ("head.mlp.", "image_projection."),
)
_TEXT_PROJECTIONS = (
    ("proj.0.", "text_projection.fc1."),
    ("proj.2.", "text_projection.fc2."),
    ("proj.", "text_projection."),
    ("text_projection.", "text_projection."),
)


def _image_projections(image: State, trunk: Any) -> tuple[tuple[str, str], ...]:
    """The names that the image projection may have, and its name here."""
    if any(key.startswith("head.") for key in image):
        return _IMAGE_PROJECTIONS
    return (*_IMAGE_PROJECTIONS, (f"trunk.{classifier_of(trunk)}.", "image_projection."))


def classifier_of(trunk: Any) -> str | None:
    """The name of a timm network's classifier, which is the projection of some of OpenCLIP's models."""
    name = getattr(trunk, "pretrained_cfg", {}).get("classifier")
    return name if isinstance(name, str) else None


def as_open_clip(model: Any, config: Mapping[str, Any]) -> State:
    """The tensors of a `clipcluster.model.clip.Clip` by OpenCLIP's names, for a model of this `model_cfg`.

    The inverse of `_open_clip`. The image tower there is timm's (`timm_model_name`) or OpenCLIP's own ViT,
    which is timm's here; the text tower is CLIP's or one of transformers.
    """
    vision, text, state = config["vision_cfg"], config["text_cfg"], model.state_dict()
    image, of_image = _inside(state, "image.trunk."), _inside(state, "image_projection.")
    words, of_text = _inside(state, "text."), _inside(state, "text_projection.")
    if "timm_model_name" in vision:
        visual = {f"trunk.{key}": value for key, value in image.items()}
        place = {"linear": "head.proj.", "mlp": "head.mlp."}.get(vision["timm_proj"])
        visual |= _placed(of_image, place or f"trunk.{classifier_of(model.image.trunk)}.")
    else:
        visual = clip_vit_of_timm(image) | {"proj": of_image["weight"].T}
    if "hf_model_name" in text:
        layers = {key.replace("fc1.", "0.").replace("fc2.", "2."): value for key, value in of_text.items()}
        words |= _placed(layers, "proj.")
    elif "bias" in of_text:
        words |= _placed(of_text, "text_projection.")
    elif of_text:
        words["text_projection"] = of_text["weight"].T
    inside = "text." if config.get("custom_text") else ""
    scalars = {key: state[key].reshape(()) for key in ("logit_scale", "logit_bias") if key in state}
    return _placed(visual, "visual.") | _placed(words, inside) | scalars


def _inside(state: State, prefix: str) -> State:
    """The tensors below a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _placed(state: State, prefix: str) -> State:
    """The state dict with a prefix before every name."""
    return {prefix + key: value for key, value in state.items()}


def _text_of(text: State, tower: Any) -> State:
    """The text tower's part, without projection, by the tower's own names."""
    if any(key.startswith("bert.") for key in text):  # Chinese-CLIP's
        inside = {key.removeprefix("bert."): value for key, value in text.items()}
        inside = _split(inside, _BERT_IN_PROJ, ".attention.self", ("query", "key", "value"))
        own = {key.replace(".attention.self.out_proj.", ".attention.output.dense."): key for key in inside}
        return {f"transformer.{name}": inside[key] for name, key in own.items()}
    if "token_embedding.weight" in text and _of_transformers(tower.transformer):
        return {f"transformer.{key}": value for key, value in clip_in_transformers(text).items()}
    return text


def _transformers(state: State, model: Any) -> State:
    """From a whole model of transformers to `clipcluster.model.clip.Clip`'s names."""
    found, known = {}, model.state_dict()
    for key, value in state.items():
        for theirs, ours in _PARTS.items():
            if key.startswith(theirs):
                # A tower inside a wrapper repeats its name; files and versions differ in it.
                inner = key.removeprefix(theirs).removeprefix(theirs)
                nested = f"{ours}{theirs}" if f"{ours}{theirs}{inner}" in known else ours
                key = f"{nested}{inner}"
        found[key] = value
    if not hasattr(model, "text"):
        return found
    found = _within(found, "image.trunk.", "image.trunk.", model.image.trunk)
    if _of_transformers(model.text.transformer):
        return _within(found, "text.transformer.", "text.transformer.", model.text.transformer)
    head = "text.transformer.head."  # SigLIP's, which is its projection
    found = {key.replace(head, "text_projection.", 1): value for key, value in found.items()}
    return _within(found, "text.transformer.", "text.", model.text)


def _within(state: State, place: str, into: str, tower: Any) -> State:
    """The tensors below `place`, named as in transformers, moved below `into` with the tower's own names."""
    inside = {key.removeprefix(place): value for key, value in state.items() if key.startswith(place)}
    rest = {key: value for key, value in state.items() if not key.startswith(place)}
    return rest | {f"{into}{key}": value for key, value in _hf_tower(inside, tower).items()}


def in_transformers(state: State, known: Collection[str]) -> State:
    """The names of a `Clip` whose towers have transformers' names as those of its whole model, `known`."""
    found = {}
    for key, value in state.items():
        for theirs, ours in _PARTS.items():
            if key.startswith(ours):
                inner = key.removeprefix(ours)
                nested = f"{theirs}{theirs}{inner}"
                key = nested if nested in known else f"{theirs}{inner}"
                break
        found[key] = value
    return found


_PARTS = {
    "vision_model.": "image.trunk.",
    "text_model.": "text.transformer.",
    "visual_projection.": "image_projection.",
}
SIZES = ("input_resolution", "context_length", "vocab_size")
"""Sizes of the model that OpenAI's state dicts hold as tensors."""

LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    "image": (
        Layout("the original ConvNeXt's", "downsample_layers.0.", _convnext),
        Layout("CLIP's ViT's", "class_embedding", _clip_vit),
        Layout("CLIP's ResNet's", "attnpool.", _clip_resnet),
        Layout("transformers' CLIP's", "embeddings.class_embedding", _hf_tower),
        Layout("transformers' SigLIP's", "head.probe", _hf_tower),
    ),
    "text": (Layout("transformers' CLIP's", "embeddings.token_embedding.", _hf_tower),),
    "model": (
        Layout("OpenCLIP's", "visual.", _open_clip),
        Layout("transformers'", "vision_model.", _transformers),
    ),
}
"""The layouts of an image tower, a text tower and a whole dual encoder."""
