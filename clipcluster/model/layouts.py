"""The names of other programs' weights as those of the towers here.

A layout recognises a state dict (prefixes removed) by one of its names and renames it. Shapes that differ by
dimensions of size one are brought together in `clipcluster.model.weights`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from timm.models import byobnet
from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Names as another program writes them.

    name: whose they are. mark: how one of them begins, and none of another layout. convert: gives the state
    dict for a module.
    """

    name: str
    mark: str
    convert: Callable[[State, Any], State]

    def recognises(self, state: Iterable[str]) -> bool:
        """Whether the names of a state dict are these."""
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
    # Sparse modules of the FCMAE pre-training hold a dense one.
    (re.compile(r"\.(?:ln|linear)\.(weight|bias)$"), r".\1"),
]


def _convnext(state: State, tower: nn.Module) -> State:
    """The names of the original ConvNeXt and ConvNeXt V2, those of FCMAE pre-training included, as timm's."""
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
    """A sparse convolution's kernel, (k * k, in, out) or depthwise (k * k, C), as (out, in, k, k).

    Its places run over x, then y: weight[o, i, y, x] = kernel[x * k + y, i, o].
    """
    size = isqrt(len(kernel))
    if kernel.ndim == 2:
        kernel = kernel.unsqueeze(1)
    return kernel.permute(2, 1, 0).unflatten(2, (size, size)).transpose(2, 3)


_CLIP_VIT = [
    (re.compile(r"^conv1\."), "patch_embed.proj."),
    (re.compile(r"^positional_embedding$"), "pos_embed"),
    (re.compile(r"^class_embedding$"), "cls_token"),
    (re.compile(r"^ln_pre\."), "norm_pre."),
    (re.compile(r"^ln_post\."), "norm."),
    (re.compile(r"^transformer\.resblocks\."), "blocks."),
    (re.compile(r"\.ln_([12])\."), r".norm\1."),
    (re.compile(r"\.ls_([12])\."), r".ls\1."),
    (re.compile(r"\.attn\.in_proj_"), ".attn.qkv."),
    (re.compile(r"\.attn\.out_proj\."), ".attn.proj."),
    (re.compile(r"\.mlp\.c_fc\."), ".mlp.fc1."),
    (re.compile(r"\.mlp\.c_proj\."), ".mlp.fc2."),
]


_CLIP_HF = [
    (re.compile(r"^conv1\."), "embeddings.patch_embedding."),
    (re.compile(r"^class_embedding$"), "embeddings.class_embedding"),
    (re.compile(r"^positional_embedding$"), "embeddings.position_embedding.weight"),
    (re.compile(r"^token_embedding\."), "embeddings.token_embedding."),
    (re.compile(r"^ln_pre\."), "pre_layrnorm."),  # as transformers writes it
    (re.compile(r"^ln_post\."), "post_layernorm."),
    (re.compile(r"^ln_final\."), "final_layer_norm."),
    (re.compile(r"^transformer\.resblocks\."), "encoder.layers."),
    (re.compile(r"\.ln_([12])\."), r".layer_norm\1."),
    (re.compile(r"\.attn\."), ".self_attn."),
    (re.compile(r"\.mlp\.c_fc\."), ".mlp.fc1."),
    (re.compile(r"\.mlp\.c_proj\."), ".mlp.fc2."),
]
_IN_PROJ = re.compile(r"\.attn\.(?:in_proj_|Wqkv\.)(weight|bias)$")
_BERT_IN_PROJ = re.compile(r"\.attention\.self\.Wqkv\.(weight|bias)$")


def _clip_vit(state: State, tower: nn.Module) -> State:
    """The names of OpenAI's and OpenCLIP's own ViT as timm's, or as transformers' where the tower is its."""
    if _of_transformers(tower):
        return _clip_hf(state)
    found = {_renamed(_IN_PROJ.sub(r".attn.in_proj_\1", key), _CLIP_VIT): v for key, v in state.items()}
    if "pos_embed" in found:
        found["pos_embed"] = found["pos_embed"].unsqueeze(0)
    return found


def _clip_hf(state: State) -> State:
    """The names of OpenAI's and OpenCLIP's own transformers, of images or text, as transformers' CLIP's."""
    separate = _split(state, _IN_PROJ, ".attn", ("q_proj", "k_proj", "v_proj"))
    return {_renamed(key, _CLIP_HF): value for key, value in separate.items()}


def _split(state: State, pattern: re.Pattern[str], place: str, names: Iterable[str]) -> State:
    """Queries, keys and values in one tensor as three."""
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
    """The names of OpenAI's and OpenCLIP's ModifiedResNet as timm's."""
    if not isinstance(tower, byobnet.ByobNet):
        return state
    return byobnet.checkpoint_filter_fn({f"visual.{key}": value for key, value in state.items()}, tower)


def _open_clip(state: State, model: Any) -> State:
    """OpenCLIP's, OpenAI's and Chinese-CLIP's names of a whole model as `clipcluster.model.clip.Clip`'s."""
    if not hasattr(model, "text"):  # a classifier, which takes its tower's weights by model.image.weights
        return state
    image = {key.removeprefix("visual."): state[key] for key in state if key.startswith("visual.")}
    text = {key.removeprefix("text."): state[key] for key in state if not key.startswith("visual.")}
    found: State = {}
    if "proj" in image:
        found["image_projection.weight"] = image.pop("proj").T
    if "text_projection" in text:
        found["text_projection.weight"] = text.pop("text_projection").T
    trunk = model.image.trunk
    for part, module, names in (
        (image, "image_projection", _image_projections(image, trunk)),
        (text, "text_projection", ["proj", "text_projection"]),
    ):
        for name in names:
            for kind in ("weight", "bias"):
                if f"{name}.{kind}" in part:
                    found[f"{module}.{kind}"] = part.pop(f"{name}.{kind}")
    found |= {key: text.pop(key) for key in ("logit_scale", "logit_bias", *SIZES) if key in text}
    if not any(key.startswith("trunk.") for key in image):
        layouts = (layout for layout in LAYOUTS["image"] if layout.recognises(image))
        image = next((layout.convert(image, trunk) for layout in layouts), image)
        image = {f"trunk.{key}": value for key, value in image.items()}
    found |= {f"image.{key}": value for key, value in image.items()}
    return found | {f"text.{key}": value for key, value in _text_of(text, model.text).items()}


def _image_projections(image: State, trunk: Any) -> list[str]:
    """What a linear layer that is the projection of images may be called."""
    names = ["attnpool.c_proj", "head.proj"]
    if not any(key.startswith("head.") for key in image):  # the network's own classifier is the projection
        names.append(f"trunk.{getattr(trunk, 'pretrained_cfg', {}).get('classifier')}")
    return names


def _text_of(text: State, tower: Any) -> State:
    """The text tower's part, without projection, as the tower has it."""
    if any(key.startswith("bert.") for key in text):  # Chinese-CLIP's
        inside = {key.removeprefix("bert."): value for key, value in text.items()}
        inside = _split(inside, _BERT_IN_PROJ, ".attention.self", ("query", "key", "value"))
        own = {key.replace(".attention.self.out_proj.", ".attention.output.dense."): key for key in inside}
        return {f"transformer.{name}": inside[key] for name, key in own.items()}
    if "token_embedding.weight" in text and _of_transformers(tower.transformer):
        return {f"transformer.{key}": value for key, value in _clip_hf(text).items()}
    return text


def _transformers(state: State, model: Any) -> State:
    """The names of a whole model of transformers as those of `clipcluster.model.clip.Clip`."""
    found, known = {}, model.state_dict()
    for key, value in state.items():
        for theirs, ours in _PARTS.items():
            if key.startswith(theirs):
                # A tower in its own wrapper repeats its name; files and versions differ in it.
                inner = key.removeprefix(theirs).removeprefix(theirs)
                nested = f"{ours}{theirs}" if f"{ours}{theirs}{inner}" in known else ours
                key = f"{nested}{inner}"
        found[key] = value
    return found


_PARTS = {
    "vision_model.": "image.trunk.",
    "text_model.": "text.transformer.",
    "visual_projection.": "image_projection.",
}
SIZES = ("input_resolution", "context_length", "vocab_size")
"""OpenAI's state dicts hold them as tensors."""

LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    "image": (
        Layout("the original ConvNeXt's", "downsample_layers.0.", _convnext),
        Layout("CLIP's ViT's", "class_embedding", _clip_vit),
        Layout("CLIP's ResNet's", "attnpool.", _clip_resnet),
    ),
    "text": (),
    "model": (
        Layout("OpenCLIP's", "visual.", _open_clip),
        Layout("transformers'", "vision_model.", _transformers),
    ),
}
"""By what is loaded: an image tower, a text tower, a whole dual encoder."""
