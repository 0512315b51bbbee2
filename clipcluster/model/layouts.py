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


def _clip_vit(state: State, tower: nn.Module) -> State:
    """The names of OpenAI's and OpenCLIP's own ViT as timm's."""
    return {_renamed(key, _CLIP_VIT): value for key, value in state.items()}


def _clip_resnet(state: State, tower: nn.Module) -> State:
    """The names of OpenAI's and OpenCLIP's ModifiedResNet as timm's."""
    if not isinstance(tower, byobnet.ByobNet):
        return state
    return byobnet.checkpoint_filter_fn({f"visual.{key}": value for key, value in state.items()}, tower)


def _open_clip(state: State, model: Any) -> State:
    """OpenCLIP's and OpenAI's names of a whole model as those of `clipcluster.model.clip.Clip`."""
    image = {key.removeprefix("visual."): state[key] for key in state if key.startswith("visual.")}
    trunk = model.image.trunk
    projections = ["attnpool.c_proj", "head.proj"]
    if not any(key.startswith("head.") for key in image):  # the network's own classifier is the projection
        projections.append(f"trunk.{trunk.pretrained_cfg.get('classifier')}")
    found: State = {}
    if "proj" in image:
        found["image_projection.weight"] = image.pop("proj").T
    for name in projections:
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in image:
                found[f"image_projection.{kind}"] = image.pop(f"{name}.{kind}")
    if not any(key.startswith("trunk.") for key in image):
        layouts = (layout for layout in LAYOUTS["image"] if layout.recognises(image))
        image = next((layout.convert(image, trunk) for layout in layouts), image)
        image = {f"trunk.{key}": value for key, value in image.items()}
    found |= {f"image.{key}": value for key, value in image.items()}
    others = (key for key in state if not key.startswith("visual."))
    return found | dict(_open_clip_text(key.removeprefix("text."), state[key]) for key in others)


def _open_clip_text(key: str, value: Tensor) -> tuple[str, Tensor]:
    if key == "text_projection":
        return "text_projection.weight", value.T
    if key == "proj.weight":
        return "text_projection.weight", value
    if key in ("logit_scale", "logit_bias", "text_projection.weight", "text_projection.bias", *SIZES):
        return key, value
    return f"text.{key}", value


SIZES = ("input_resolution", "context_length", "vocab_size")
"""OpenAI's state dicts hold them as tensors."""

LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    "image": (
        Layout("the original ConvNeXt's", "downsample_layers.0.", _convnext),
        Layout("CLIP's ViT's", "class_embedding", _clip_vit),
        Layout("CLIP's ResNet's", "attnpool.", _clip_resnet),
    ),
    "text": (),
    "model": (Layout("OpenCLIP's", "visual.", _open_clip),),
}
"""By what is loaded: an image tower, a text tower, a whole dual encoder."""
