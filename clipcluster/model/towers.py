"""Towers by name: image towers from timm or transformers, text towers from transformers, or CLIP's own."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

from clipcluster.data.tokenizer import Tokenizer
from clipcluster.errors import UserError
from clipcluster.model.clip_text import ClipTextTower
from clipcluster.model.hugging_face import (
    class_of,
    config_of,
    has_optional_pooler,
    network_of,
    pretrained,
    quiet_transformers,
    refusing,
    unknown,
)
from clipcluster.model.masking import mask_patches
from clipcluster.model.pooling import at, last_of, mean_of_real
from clipcluster.model.weight_files import WeightsFrom
from clipcluster.model.weights import Coverage, load_weights
from clipcluster.recipe.sections import model as sections

# The default pooling of text towers, by architecture.
_POOLS = {
    "last": "gpt2 gpt_neo gpt_neox gptj opt llama mistral qwen2 qwen3 gemma gemma2 phi",
    "first": "bert roberta xlm-roberta distilbert electra albert camembert mpnet ernie roberta-prelayernorm "
    "deberta deberta-v2 modernbert",
}
POOL_OF_ARCH = {arch: pool for pool, archs in _POOLS.items() for arch in archs.split()}
# Architectures that number positions from the padding token's id + 1.
_POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "camembert", "mpnet", "roberta-prelayernorm"}
# Architectures with learned positions, which can be interpolated to a longer context.
_LEARNED_POSITIONS = {"gpt2", "opt", "bert", "distilbert", "electra", "albert", "ernie"}
_LEARNED_POSITIONS |= _POSITIONS_AFTER_PADDING
_WHOLE_VOCABULARY = 0.9  # of a tower's embeddings, some of which have more rows than their tokenizer tokens


class ImageTower(nn.Module):
    """A timm network without its classifier: (B, 3, S, S) float -> (B, width)."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images)


class HfImageTower(ImageTower):
    """A transformers network without its head: (B, 3, S, S) float -> (B, width).

    pool: the network's own `pooler`, the `first` token, or the `mean` over tokens or positions.
    """

    def __init__(self, trunk: nn.Module, width: int, pool: str) -> None:
        super().__init__(trunk, width)
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        output = self.trunk(pixel_values=images)
        if self.pool == "pooler":
            return output.pooler_output.flatten(1)  # convolutional networks: (B, width, 1, 1)
        states = output.last_hidden_state
        if states.ndim == 4:
            return states.mean(dim=(2, 3))
        return states[:, 0] if self.pool == "first" else states.mean(dim=1)


class TextTower(nn.Module):
    """A transformers network without its head: (B, L) int64 tokens, (B, L) bool mask -> (B, width).

    pool: `last` real token, `first` token, `mean` over the real tokens, or the network's own `pooler`.
    """

    def __init__(self, transformer: nn.Module, width: int, pool: str) -> None:
        super().__init__()
        self.transformer = transformer
        self.width = width
        self.pool = pool

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        # A caption without a real token keeps its first one: attention over no token is NaN.
        first = torch.zeros_like(mask)
        first[:, 0] = ~mask.any(dim=1)
        mask = mask | first
        output = self.transformer(input_ids=tokens, attention_mask=mask.long())
        if self.pool == "pooler":
            return output.pooler_output
        states = output.last_hidden_state
        if self.pool == "first":
            return states[:, 0]
        return mean_of_real(states, mask) if self.pool == "mean" else at(states, last_of(mask))


def build_image_tower(
    config: sections.ImageTower,
    *,
    image_size: int,
    assets: Path | None = None,
    weights_from: WeightsFrom | None = None,
    starting_weights: bool = True,
) -> tuple[ImageTower, Coverage | None]:
    """The tower of `model.image`: by `timm` and `args`, or by `hf`; with its weights and masking.

    starting_weights: whether they are read; the tower is the same without.

    Raises UserError for a name that timm does not know (with the nearest), for arguments the tower does not
    take, a mask_ratio where there are no patches to leave out, and for weights that do not match.
    """
    if isinstance(config, sections.TimmImageTower):
        tower, folder = _timm_tower(config, image_size), None
    else:
        tower, folder = _hf_image_tower(config, image_size, assets)
    if not starting_weights:
        return tower, None
    return tower, _started(tower.trunk, config, "image", weights_from, folder)


def _timm_tower(config: sections.TimmImageTower, image_size: int) -> ImageTower:
    name, args = config.timm, dict(config.args)
    if not timm.is_model(name):
        raise UserError(
            unknown(f"model.image.timm: timm {timm.__version__} has no model", name, timm.list_models())
        )
    if config.mask_ratio:
        args["patch_drop_rate"] = config.mask_ratio
    with refusing(f"model.image: timm cannot build {name} for images of {image_size} pixels with {args}"):
        try:
            trunk = _timm_network(name, image_size, args)
        except TypeError as error:
            if "patch_drop_rate" not in str(error):
                raise
            raise UserError(_no_patches(name)) from error
    if config.mask_ratio and not _drops_patches(trunk):
        raise UserError(_no_patches(name))
    width = getattr(trunk, "head_hidden_size", None) or trunk.num_features
    return ImageTower(trunk, int(width))


def _timm_network(name: str, image_size: int, args: dict[str, Any]) -> Any:
    try:  # for towers that have positions to lay out
        return timm.create_model(name, pretrained=False, num_classes=0, img_size=image_size, **args)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, pretrained=False, num_classes=0, **args)


def _drops_patches(trunk: nn.Module) -> bool:
    return any(isinstance(module, (PatchDropout, PatchDropoutWithIndices)) for module in trunk.modules())


def _no_patches(name: str) -> str:
    return (
        f"model.image.mask_ratio: {name} has no patch tokens that could be left out; set it to 0, or name a "
        "vision transformer."
    )


def _hf_image_tower(
    config: sections.HfImageTower, image_size: int, assets: Path | None
) -> tuple[HfImageTower, Path | None]:
    """The tower, and the folder of its configuration, if it has one here."""
    key = "model.image"
    settings, folder = config_of(key, config.hf, assets)
    settings = getattr(settings, "vision_config", settings)  # of a dual encoder: its image tower
    if hasattr(settings, "image_size"):
        settings.image_size = image_size
    trunk = network_of(key, settings, pooler=config.pool == "pooler")
    takes = inspect.signature(trunk.forward).parameters.values()
    needs = [each.name for each in takes if each.default is each.empty and each.kind != each.VAR_KEYWORD]
    if "pixel_values" not in {each.name for each in takes} or set(needs) - {"pixel_values"}:
        raise UserError(f"{key}.hf: {settings.model_type} does not take images alone; name a vision network.")
    _without_mask_tokens(trunk)
    sizes = getattr(settings, "hidden_sizes", None)  # of the stages of a convolutional network
    width = sizes[-1] if sizes else settings.hidden_size
    if config.mask_ratio:
        mask_patches(trunk, settings, config.mask_ratio)
    return HfImageTower(trunk, int(width), config.pool), folder


def _without_mask_tokens(trunk: nn.Module) -> None:
    """Make mask tokens of a pre-training buffers: files have them, and no feature depends on them."""
    named = [name for name, _ in trunk.named_parameters() if name.rpartition(".")[2] == "mask_token"]
    for name in named:
        module, token = trunk.get_submodule(name.rpartition(".")[0]), trunk.get_parameter(name)
        del module.mask_token
        module.register_buffer("mask_token", token.detach())


def build_text_tower(
    config: sections.TextTower,
    *,
    tokenizer: Tokenizer,
    assets: Path | None = None,
    weights_from: WeightsFrom | None = None,
    starting_weights: bool = True,
    longer: bool = False,
) -> tuple[TextTower | ClipTextTower, Coverage | None]:
    """The tower of `model.text`: by `hf`, by `arch` and `config`, or `clip`; with its weights and pooling.

    starting_weights: whether they are read; the tower is the same without. longer: as of `check_fits`, for
    weights of the whole model.

    Raises UserError for an unknown architecture or setting, a vocabulary smaller than the tokenizer's, a
    context longer than the tower's positions, and for weights that do not match.
    """
    if isinstance(config, sections.ClipTextTower):
        sizes = config.clip.model_dump()
        rows = sizes.pop("vocab_size")
        if rows is not None and rows < tokenizer.vocab_size:
            raise UserError(
                f"model.text.clip.vocab_size: {rows} rows are fewer than the tokenizer's "
                f"{tokenizer.vocab_size} tokens; remove it, or name the tokenizer the tower was trained with."
            )
        clip = ClipTextTower(
            vocab_size=rows or tokenizer.vocab_size, positions=tokenizer.context_length, **sizes
        )
        return clip, _started(clip, config, "text", weights_from) if starting_weights else None
    folder = None
    if isinstance(config, sections.HfTextTower):
        settings, folder = config_of("model.text", config.hf, assets)
    else:
        settings = _config_from_arch(config.arch, dict(config.config), tokenizer)
    settings.use_cache = False
    check_fits(settings, tokenizer, longer=longer or bool(config.weights))
    pool = config.pool or POOL_OF_ARCH.get(settings.model_type)
    transformer = _transformer(settings, pool or "")
    if pool is None:
        raise UserError(
            f"model.text.pool: the pooling of {settings.model_type} is unknown; "
            "set it to last, first or mean."
        )
    coverage = _started(transformer, config, "text", weights_from, folder) if starting_weights else None
    return TextTower(transformer, int(settings.hidden_size), pool), coverage


def _started(
    tower: nn.Module, config: Any, name: str, weights_from: WeightsFrom | None, folder: Path | None = None
) -> Coverage | None:
    """The tower takes the weights that its section names, where it names any.

    folder: of its configuration, for `pretrained` ones.
    """
    if not config.weights:
        return None
    belong = config.weights == "pretrained"
    return load_weights(
        tower,
        pretrained(f"model.{name}", config.hf, folder) if belong else Path(config.weights),
        name=name,
        missing=config.missing,
        weights_from=weights_from,
    )


def _config_from_arch(arch: str, given: dict[str, Any], tokenizer: Tokenizer) -> Any:
    """A configuration from a model type and given values; vocabulary and positions are the tokenizer's."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if arch not in CONFIG_MAPPING:
        raise UserError(
            unknown("model.text.arch: transformers has no model type", arch, list(CONFIG_MAPPING))
        )
    kind = CONFIG_MAPPING[arch]
    with refusing(f"model.text.arch: {arch} cannot be built from sizes alone"):  # composed of two models
        known = set(kind().to_dict()) | set(kind.attribute_map)
    for key in given:
        if key not in known:
            raise UserError(unknown(f"model.text.config: {arch} has no setting", key, sorted(known)))
    special = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id, "bos_token_id": None}
    chosen = {"vocab_size": tokenizer.vocab_size, **special} | given
    positions = kind.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if positions in known and not {positions, "max_position_embeddings"} & set(given):
        before = int(chosen["pad_token_id"]) + 1 if arch in _POSITIONS_AFTER_PADDING else 0
        chosen[positions] = tokenizer.context_length + before
    with quiet_transformers(), refusing(f"model.text.config: {arch} does not take {given}"):
        return AutoConfig.for_model(arch, **chosen)


def check_fits(settings: Any, tokenizer: Tokenizer, *, longer: bool = False) -> None:
    """UserError where a text network of this configuration cannot take the tokenizer's tokens.

    longer: raise the number of learned positions to the context's length, for weights that are interpolated.
    """
    if getattr(settings, "is_encoder_decoder", False) or not hasattr(settings, "vocab_size"):
        raise UserError(
            f"model.text: {settings.model_type} is not a single text network (encoder-decoders and dual "
            "encoders are not supported); name a model such as gpt2, bert or roberta."
        )
    if settings.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.text: the tower's vocabulary has {settings.vocab_size} tokens, "
            f"the tokenizer has {tokenizer.vocab_size}. Set data.text.tokenizer to the tokenizer that "
            "the tower was trained with, or remove vocab_size."
        )
    positions = text_positions(settings)
    if positions is None or tokenizer.context_length <= positions:
        return
    sinusoidal = getattr(settings, "sinusoidal_pos_embds", False)  # of DistilBERT, as an option
    if longer and settings.model_type in _LEARNED_POSITIONS and not sinusoidal:
        settings.max_position_embeddings += tokenizer.context_length - positions
    else:
        raise UserError(
            f"data.text.context_length: {tokenizer.context_length} is longer than the text tower's "
            f"{positions} positions; at most {positions} fit."
        )


def text_positions(settings: Any) -> int | None:
    """The tokens that a text network of this configuration takes at most; None where it sets no limit."""
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is None or positions < 0:  # XLNet says -1
        return None
    before = settings.pad_token_id + 1 if settings.model_type in _POSITIONS_AFTER_PADDING else 0
    return int(positions) - before


def foreign_tokenizer(tower: TextTower | ClipTextTower, tokenizer: Tokenizer) -> str:
    """A warning about a tokenizer with far fewer tokens than the weights of a tower are for; else ""."""
    embeddings: Any = getattr(tower.transformer, "get_input_embeddings", None)
    known = embeddings().num_embeddings if embeddings else tokenizer.vocab_size
    if tokenizer.vocab_size >= _WHOLE_VOCABULARY * known:
        return ""
    return (
        f"it has {tokenizer.vocab_size:,} tokens, and the text tower's weights are for {known:,}; name the "
        "tokenizer that they were trained with"
    )


def _transformer(settings: Any, pool: str) -> nn.Module:
    """The network without head, with its pooler where `pool` is `pooler`. Raises UserError."""
    pooler = pool == "pooler"
    if pooler and not has_optional_pooler(class_of("model.text", settings)):
        raise UserError(
            f"model.text.pool: {settings.model_type} has no pooler of its own; set it to last, first or mean."
        )
    network = network_of("model.text", settings, pooler=pooler)
    if not isinstance(network.get_input_embeddings(), nn.Embedding):  # type: ignore[operator]
        raise UserError(f"model.text: {settings.model_type} does not take tokens as input.")
    return network
