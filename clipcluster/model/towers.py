"""Image towers from timm and text towers from transformers, by name."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from clipcluster.data.tokenizer import Tokenizer, asset_folder
from clipcluster.errors import UserError
from clipcluster.model.clip_text import ClipTextTower
from clipcluster.model.pooling import last_real, mean_of_real
from clipcluster.model.weight_files import HF_FILES, WeightsFrom, shard_names
from clipcluster.model.weights import Coverage, load_weights
from clipcluster.recipe.sections import model as sections

# How a caption's vector is taken from its tokens' when the recipe does not say.
_POOLS = {
    "last": "gpt2 gpt_neo gpt_neox gptj opt llama mistral qwen2 qwen3 gemma gemma2 phi",
    "first": "bert roberta xlm-roberta distilbert electra albert camembert mpnet ernie roberta-prelayernorm "
    "deberta deberta-v2 modernbert",
}
POOL_OF_ARCH = {arch: pool for pool, archs in _POOLS.items() for arch in archs.split()}
# These count positions from the padding token's id + 1.
_POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "camembert", "mpnet", "roberta-prelayernorm"}
_OWN_IMAGE_ARGS = ("pretrained", "num_classes", "img_size", "checkpoint_path", "features_only")


class ImageTower(nn.Module):
    """A timm network without its classifier: (B, 3, S, S) float -> (B, width)."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images)


class TextTower(nn.Module):
    """A transformers network without its head: (B, L) int64 tokens, (B, L) bool mask -> (B, width).

    pool: `last` real token, `first` token, or `mean` over the real tokens.
    """

    def __init__(self, transformer: nn.Module, width: int, pool: str) -> None:
        super().__init__()
        self.transformer = transformer
        self.width = width
        self.pool = pool

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        # A caption without a real token keeps its first one: attention over nothing is not a number.
        first = torch.zeros_like(mask)
        first[:, 0] = ~mask.any(dim=1)
        mask = mask | first
        states = self.transformer(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        if self.pool == "first":
            return states[:, 0]
        return mean_of_real(states, mask) if self.pool == "mean" else last_real(states, mask)


def build_image_tower(
    config: sections.ImageTower, *, image_size: int, weights_from: WeightsFrom | None = None
) -> tuple[ImageTower, Coverage | None]:
    """The tower of `model.image`: `timm` (name), `args` (mapping), `weights` (file, folder or None).

    Raises UserError for a name that timm does not know (with the nearest), for arguments the tower does not
    take, and for weights that do not match.
    """
    name, args = config.timm, dict(config.args)
    if not timm.is_model(name):
        raise UserError(
            _unknown(f"model.image.timm: timm {timm.__version__} has no model", name, timm.list_models())
        )
    for key in _OWN_IMAGE_ARGS:
        if key in args:
            raise UserError(
                f"model.image.args.{key} is decided by the recipe's other keys "
                "(data.image.size, model.image.weights): remove it."
            )
    with _refusing(f"model.image: timm cannot build {name} for images of {image_size} pixels with {args}"):
        try:  # for towers that have positions to lay out
            trunk: Any = timm.create_model(name, pretrained=False, num_classes=0, img_size=image_size, **args)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            trunk = timm.create_model(name, pretrained=False, num_classes=0, **args)
    width = getattr(trunk, "head_hidden_size", None) or trunk.num_features
    return ImageTower(trunk, int(width)), _started(trunk, config, "image", weights_from)


def build_text_tower(
    config: sections.TextTower,
    *,
    tokenizer: Tokenizer,
    assets: Path | None = None,
    weights_from: WeightsFrom | None = None,
) -> tuple[TextTower | ClipTextTower, Coverage | None]:
    """The tower of `model.text`: by `hf`, by `arch` and `config`, or `clip`; with its weights and pooling.

    Raises UserError for an unknown architecture or setting, a vocabulary smaller than the tokenizer's, a
    context longer than the tower's positions, and for weights that do not match.
    """
    if isinstance(config, sections.ClipTextTower):
        clip = ClipTextTower(
            vocab_size=tokenizer.vocab_size, positions=tokenizer.context_length, **config.clip.model_dump()
        )
        return clip, _started(clip, config, "text", weights_from)
    folder = None
    if isinstance(config, sections.HfTextTower):
        settings, folder = _config_from_hf(config.hf, assets)
    else:
        settings = _config_from_arch(config.arch, dict(config.config), tokenizer)
    settings.use_cache = False
    _check_fits(settings, tokenizer)
    transformer = _transformer(settings)
    pool = config.pool or POOL_OF_ARCH.get(settings.model_type)
    if pool is None:
        raise UserError(
            f"model.text.pool: the pooling of {settings.model_type} is unknown; "
            "set it to last, first or mean."
        )
    source = None
    if isinstance(config, sections.HfTextTower) and config.weights == "pretrained":
        source = _pretrained(config.hf, folder)
    coverage = _started(transformer, config, "text", weights_from, source)
    return TextTower(transformer, int(settings.hidden_size), pool), coverage


def _started(
    tower: nn.Module, config: Any, name: str, weights_from: WeightsFrom | None, source: Path | None = None
) -> Coverage | None:
    """The tower takes the weights that its section names (or those of `source`), where it names any."""
    if not config.weights:
        return None
    return load_weights(
        tower,
        source or Path(config.weights),
        name=name,
        missing=config.missing,
        weights_from=weights_from,
    )


def _config_from_arch(arch: str, given: dict[str, Any], tokenizer: Tokenizer) -> Any:
    """A configuration from a model type and sizes; vocabulary and positions are the tokenizer's."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if arch not in CONFIG_MAPPING:
        raise UserError(
            _unknown("model.text.arch: transformers has no model type", arch, list(CONFIG_MAPPING))
        )
    kind = CONFIG_MAPPING[arch]
    with _refusing(f"model.text.arch: {arch} cannot be built from sizes alone"):  # as pairs of models
        known = set(kind().to_dict()) | set(kind.attribute_map)
    for key in given:
        if key not in known:
            raise UserError(_unknown(f"model.text.config: {arch} has no setting", key, sorted(known)))
    special = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id, "bos_token_id": None}
    chosen = {"vocab_size": tokenizer.vocab_size, **special} | given
    positions = kind.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if positions in known and not {positions, "max_position_embeddings"} & set(given):
        before = int(chosen["pad_token_id"]) + 1 if arch in _POSITIONS_AFTER_PADDING else 0
        chosen[positions] = tokenizer.context_length + before
    with _quiet_transformers(), _refusing(f"model.text.config: {arch} does not take {given}"):
        return AutoConfig.for_model(arch, **chosen)


def _config_from_hf(name: str, assets: Path | None) -> tuple[Any, Path | None]:
    """The configuration of a local folder, of a folder fetched at submission, or of a name on the hub."""
    from transformers import AutoConfig

    folders = [Path(name)] if assets is None else [asset_folder(assets, name), Path(name)]
    folder = next((f for f in folders if (f / "config.json").is_file()), None)
    reachable = "a folder with a config.json nor a name on the hub that can be reached from here"
    with _refusing(f"model.text.hf: {name} is neither {reachable}"):
        return AutoConfig.from_pretrained(str(folder or name)), folder


def _pretrained(name: str, folder: Path | None) -> Path:
    """The weights that belong to a configuration: in its folder, else in the hub's cache, else fetched."""
    from transformers.utils import cached_file

    if folder is not None and (folder == Path(name) or any((folder / f).is_file() for f in HF_FILES)):
        return folder
    with _refusing(f"model.text.weights: the weights of {name} cannot be reached on the hub from here"):
        for file in HF_FILES:
            found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                for shard in shard_names(Path(found)):
                    cached_file(name, shard)
                return Path(found)
    raise UserError(f"model.text.weights: {name} has none of {', '.join(HF_FILES)}.")


def _check_fits(settings: Any, tokenizer: Tokenizer) -> None:
    if getattr(settings, "is_encoder_decoder", False) or not hasattr(settings, "vocab_size"):
        raise UserError(
            f"model.text: {settings.model_type} is not a single text network (encoder-decoders and dual "
            "encoders are not supported); name a model such as gpt2, bert or roberta."
        )
    if settings.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.text: the tower knows {settings.vocab_size} tokens, "
            f"the tokenizer has {tokenizer.vocab_size}. Set data.text.tokenizer to the tokenizer that "
            "the tower was trained with, or remove vocab_size."
        )
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is None or positions < 0:  # no limit: XLNet says -1
        return
    if settings.model_type in _POSITIONS_AFTER_PADDING:
        positions -= settings.pad_token_id + 1
    if tokenizer.context_length > positions:
        raise UserError(
            f"data.text.context_length: {tokenizer.context_length} is longer than the text tower's "
            f"{positions} positions; at most {positions} fit."
        )


def _transformer(settings: Any) -> nn.Module:
    """The network without pooler or head, in float32, from random weights."""
    from transformers import AutoModel

    try:
        kind: Any = AutoModel._model_mapping[type(settings)]
    except KeyError as error:
        raise UserError(
            f"model.text: transformers has no plain network for {settings.model_type}."
        ) from error
    takes = inspect.signature(kind).parameters
    no_pooler = {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
    # Attention by PyTorch where the network has it: the attention mask is honoured in both.
    attention = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"
    what = f"model.text: transformers cannot build {settings.model_type} of these sizes"
    with _quiet_transformers(), _refusing(what):
        network = AutoModel.from_config(
            settings, dtype=torch.float32, attn_implementation=attention, **no_pooler
        )
    if not isinstance(network.get_input_embeddings(), nn.Embedding):
        raise UserError(f"model.text: {settings.model_type} does not take tokens as input.")
    return network


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Warnings about special tokens of a class's default vocabulary concern no tower built here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever a library raises about a name or a setting, as UserError: each of its classes has its own."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {error}") from error


def _unknown(what: str, given: str, known: list[str]) -> str:
    near = difflib.get_close_matches(given, known, n=5, cutoff=0.5)
    hint = f"Nearest: {', '.join(near)}." if near else "No known name is similar."
    return f"{what} {given!r}. {hint}"
