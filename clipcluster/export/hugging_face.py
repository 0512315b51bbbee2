"""A dual encoder as a folder of transformers: CLIP, Chinese-CLIP, SigLIP or VisionTextDualEncoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipcluster.build.opened import Opened
from clipcluster.errors import UserError
from clipcluster.export.compare import compare, is_dual_encoder, unit
from clipcluster.export.preprocessing import write_image_processor, write_tokenizer
from clipcluster.export.transformers_towers import TransformersTower, image_tower, text_tower
from clipcluster.model.hugging_face import quiet_transformers, refusing
from clipcluster.model.layouts import in_transformers


class _Kind(NamedTuple):
    """A dual encoder of transformers: its model type, its processor's class, how it takes a text's vector."""

    model_type: str
    processor: str
    pools: tuple[str, ...]


_PAIR = _Kind("vision-text-dual-encoder", "VisionTextDualEncoderProcessor", ("pooler",))
"""Of any two towers that have a pooler of their own."""
_KINDS = {
    # At the end token, which is also the last one that is real.
    ("clip_vision_model", "clip_text_model"): _Kind("clip", "CLIPProcessor", ("pooler", "last")),
    ("chinese_clip_vision_model", "chinese_clip_text_model"): _Kind(
        "chinese_clip", "ChineseCLIPProcessor", ("first",)
    ),
    ("siglip_vision_model", "siglip_text_model"): _Kind("siglip", "SiglipProcessor", ("pooler",)),
}
"""By the model types of the two towers."""


def write(opened: Opened, folder: Path) -> None:
    """Write the model, its image processor and its tokenizer, as `AutoModel` and `AutoProcessor` read them.

    Raises UserError, by key, where the model's parts make none of transformers' dual encoders, and where the
    written model gives other features.
    """
    if not is_dual_encoder(opened):
        raise UserError(
            f"task: {opened.recipe.task} trains no dual encoder, which is what --format hf is for; "
            "--format safetensors and onnx take a classifier."
        )
    image, text = image_tower(opened), text_tower(opened)
    kind = _KINDS.get((image.config.model_type, text.config.model_type), _PAIR)
    _check_parts(opened, kind, image, text)
    network = _network(opened, kind, image, text)
    network.save_pretrained(str(folder))
    write_image_processor(opened, folder, kind.processor)
    write_tokenizer(opened, folder, masked=kind.model_type != "siglip")
    _check_features(opened, folder)


def _check_parts(opened: Opened, kind: _Kind, image: TransformersTower, text: TransformersTower) -> None:
    others = "Choose --format open_clip, safetensors or onnx."
    for name, tower in (("image", image), ("text", text)):
        model_type, pools = tower.config.model_type, ("pooler",) if name == "image" else kind.pools
        if tower.pool not in pools:
            raise UserError(
                f"model.{name}.pool: {tower.pool}, but transformers' {kind.model_type} takes the {name} "
                f"tower's vector by {' or '.join(pools)}. {others}"
            )
        if kind is _PAIR and not hasattr(tower.config, "hidden_size"):
            raise UserError(
                f"model.{name}: transformers' {kind.model_type} does not take {model_type}, whose "
                f"configuration has no hidden_size. {others}"
            )
    projected = kind.model_type != "siglip"
    for name, tower in (("image", image), ("text", text)):
        projection = getattr(opened.model, f"{name}_projection")
        linear = isinstance(projection, nn.Linear) and projection.bias is None
        if not (linear if projected else tower.projected or isinstance(projection, nn.Identity)):
            wanted = "a linear projection without bias" if projected else "no projection"
            raise UserError(
                f"model.projection_bias: transformers' {kind.model_type} has {wanted} after the {name} "
                f"tower. {others}"
            )
    if opened.model.logit_bias is not None and projected:
        raise UserError(
            f"model.logit_bias: transformers' {kind.model_type} has no bias of the logits. {others}"
        )


def _network(opened: Opened, kind: _Kind, image: TransformersTower, text: TransformersTower) -> Any:
    """The whole model with its weights."""
    from transformers import AutoConfig, AutoModel

    sections = {"vision_config": image.config.to_dict(), "text_config": text.config.to_dict()}
    more = {} if kind.model_type == "siglip" else {"projection_dim": opened.model.embed_dim}
    what = f"model: transformers cannot build {kind.model_type} of these towers"
    with quiet_transformers(), refusing(what):
        config = AutoConfig.for_model(kind.model_type, **sections, **more)
        network = AutoModel.from_config(config, dtype=torch.float32)
    own = network.state_dict()
    apart = ("image.", "text.", *(("text_projection.",) if text.projected else ()))
    rest = {k: v for k, v in opened.model.state_dict().items() if not k.startswith(apart)}
    state = {f"image.trunk.{key}": value for key, value in image.state.items()}
    state |= {f"text.transformer.{key}": value for key, value in text.state.items()}
    named = in_transformers(state | rest, own)
    if "logit_bias" in own:  # a model that was trained without one
        named.setdefault("logit_bias", torch.zeros_like(own["logit_bias"]))
    scalars = {key: named[key].reshape(own[key].shape) for key in ("logit_scale", "logit_bias") if key in own}
    with refusing(what):
        network.load_state_dict(named | scalars)
    return network.eval()


def _check_features(opened: Opened, folder: Path) -> None:
    """The model as transformers reads it from the folder gives the same features."""
    from transformers import AutoModel

    with quiet_transformers():
        theirs = AutoModel.from_pretrained(str(folder), local_files_only=True).eval()

    def image(pixels: Tensor) -> Tensor:
        return unit(_tensor(theirs.get_image_features(pixel_values=pixels)))

    def text(tokens: Tensor, mask: Tensor) -> Tensor:
        seen = {} if theirs.config.model_type == "siglip" else {"attention_mask": mask.long()}
        return unit(_tensor(theirs.get_text_features(input_ids=tokens, **seen)))

    compare(opened, f"transformers' {theirs.config.model_type}", image, text)


def _tensor(output: Any) -> Tensor:
    """The features of `get_…_features`: alone in transformers 4, among others since."""
    return output if isinstance(output, Tensor) else output.pooler_output
