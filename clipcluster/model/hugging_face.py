"""Networks of transformers: configurations, weight files, and errors of the library as messages."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipcluster.data.tokenizer import asset_folder
from clipcluster.errors import UserError
from clipcluster.model.weight_files import HF_FILES, shard_names


def config_of(key: str, name: str, assets: Path | None) -> tuple[Any, Path | None]:
    """A model's configuration, and its folder: a local one or one fetched at submission; None for a hub name.

    Raises UserError where there is none.
    """
    from transformers import AutoConfig

    folder = next((f for f in _folders(name, assets) if (f / "config.json").is_file()), None)
    reachable = "a folder with a config.json nor a name on the hub that can be reached from here"
    with refusing(f"{key}.hf: {name} is neither {reachable}"):
        # else transformers asks on a terminal whether to run the code that a folder brings
        return AutoConfig.from_pretrained(str(folder or name), trust_remote_code=False), folder


def pixels_of(name: str, assets: Path | None) -> list[float] | None:
    """Mean and standard deviation of the three channels by a folder's processor file; None without one."""
    for folder in _folders(name, assets):
        for file in ("preprocessor_config.json", "processor_config.json"):
            if (folder / file).is_file():
                written = json.loads((folder / file).read_text(encoding="utf-8"))
                values = written.get("image_processor", written) if isinstance(written, dict) else None
                if isinstance(values, dict):
                    pixels = _three(values.get("image_mean")) + _three(values.get("image_std"))
                    if len(pixels) == 6:
                        return pixels
    return None


def _three(value: Any) -> list[float]:
    """A number for each colour; none where the file has anything else, such as one for grey images."""
    numbers = value if isinstance(value, list) and len(value) == 3 else []
    return [float(number) for number in numbers if isinstance(number, int | float)]


def _folders(name: str, assets: Path | None) -> list[Path]:
    """The folders to look for the files of a name: the one fetched at submission, then its own."""
    return [Path(name)] if assets is None else [asset_folder(assets, name), Path(name)]


def pretrained(key: str, name: str, folder: Path | None) -> Path:
    """The weights that belong to a configuration: in its folder, else in the hub's cache, else fetched.

    Raises UserError where there are none, or the hub cannot be reached.
    """
    from transformers.utils import cached_file

    if folder is not None and (folder == Path(name) or any((folder / f).is_file() for f in HF_FILES)):
        return folder
    with refusing(f"{key}.weights: the weights of {name} cannot be reached on the hub from here"):
        for file in HF_FILES:
            found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                for shard in shard_names(Path(found)):
                    cached_file(name, shard)
                return Path(found)
    raise UserError(f"{key}.weights: {name} has none of {', '.join(HF_FILES)}.")


def names_in(network: Any, names: Sequence[str]) -> dict[str, str]:
    """Names in a file -> names in a network of the installed transformers.

    Newer versions have other names for some parts in the network than in the files that they read and write.
    """
    if not hasattr(network, "base_model_prefix") or not find_spec("transformers.conversion_mapping"):
        return {name: name for name in names}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    rules = [rule for rule in get_model_conversion_mapping(network) if isinstance(rule, WeightRenaming)]
    return {name: apply_renamings(name, rules) for name in sorted(names)}


def network_of(key: str, settings: Any, *, pooler: bool) -> nn.Module:
    """The network of a configuration without head, in float32, with random weights.

    pooler: with the network's own pooling layer, where it may be left out.
    Raises UserError where transformers has none, or cannot build it of these sizes.
    """
    from transformers import AutoModel

    kind = class_of(key, settings)
    chosen = {"add_pooling_layer": pooler} if has_optional_pooler(kind) else {}
    # PyTorch's attention where the network supports it; both honour the attention mask.
    attention = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"
    what = f"{key}: transformers cannot build {settings.model_type} of these sizes"
    with quiet_transformers(), refusing(what):
        network: nn.Module = AutoModel.from_config(
            settings, dtype=torch.float32, attn_implementation=attention, **chosen
        )
    return network


def class_of(key: str, settings: Any) -> Any:
    """The class of the network without head of a configuration; UserError where there is none."""
    from transformers import AutoModel

    try:
        return AutoModel._model_mapping[type(settings)]
    except KeyError as error:
        raise UserError(f"{key}: transformers has no plain network for {settings.model_type}.") from error


def has_optional_pooler(kind: Any) -> bool:
    """Whether the class of a network builds its pooling layer on request."""
    return "add_pooling_layer" in inspect.signature(kind).parameters


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers logs errors only: its warnings about default tokens concern no tower here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Inside, exceptions of a library, of whatever class, become UserError with `what` at the beginning.

    One that is a UserError already stays as it is.
    """
    try:
        yield
    except (MemoryError, UserError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {error}") from error


def unknown(what: str, given: str, known: list[str]) -> str:
    """A message for an unknown name, with the nearest known ones."""
    near = difflib.get_close_matches(given, known, n=5, cutoff=0.5)
    hint = f"Nearest: {', '.join(near)}." if near else "No known name is similar."
    return f"{what} {given!r}. {hint}"
