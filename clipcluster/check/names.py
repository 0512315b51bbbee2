"""Checking names of timm, transformers and the hub by the files on this machine. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from clipcluster.errors import UserError
from clipcluster.runs import files
from clipcluster.text import did_you_mean, nearest

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
CONFIGURATION = ("config.json",)
TIMM, TRANSFORMERS = "timm", "transformers"


def check_image_tower(name: str) -> str:
    """UserError for the name of a timm tower that does not exist; "", or why it cannot be checked here.

    The known names are those that a deep check with this version of timm stored.
    """
    bare = name.split(".", 1)[0]  # what follows a dot is a tag
    return _check(bare, TIMM, "models", f"model {name!r}")


def check_optimizer(name: str) -> str:
    """As `check_image_tower`, for an optimizer; UserError also for one that cannot be used here."""
    if name == "adamw":
        return ""
    return _check(name, TIMM, "optimizers", f"optimizer {name!r} that can be used here")


def check_text_tower(arch: str) -> str:
    """As `check_image_tower`, for a model type of transformers."""
    towers = "text towers are gpt2, bert, roberta, modernbert and others"
    return _check(arch, TRANSFORMERS, "types", f"model type {arch!r} ({towers})")


def _check(name: str, library: str, kind: str, called: str) -> str:
    known = _stored_names(library, kind)
    if known is None:
        return f"{name!r}: the first check with --deep stores the names of {library}"
    if name in known:
        return ""
    hint = did_you_mean(name.lower(), known)
    if not hint and kind == "optimizers":  # of models there are too many
        hint = f"; usable: {', '.join(known)}"
    raise UserError(f"{library} {_version(library)} has no {called}{hint}")


def store_names() -> None:
    """Store the libraries' names for later plain checks, once a version. Loads them; may raise OSError."""
    if _stored_names(TIMM, "models") is None:
        import timm
        from timm.models import get_deprecated_models

        _store(TIMM, "models", [*timm.list_models(), *get_deprecated_models()])
    if _stored_names(TIMM, "optimizers") is None:
        from clipcluster.train.timm_optimizers import usable_optimizers

        _store(TIMM, "optimizers", usable_optimizers())
    if _stored_names(TRANSFORMERS, "types") is None:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        _store(TRANSFORMERS, "types", list(CONFIG_MAPPING))


def _store(library: str, kind: str, names: list[str]) -> None:
    file = _names_file(library, kind)
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(file, names)


def _stored_names(library: str, kind: str) -> list[str] | None:
    """The names stored for the installed version; None where there are none, or the file is damaged."""
    try:
        names = json.loads(_names_file(library, kind).read_text(encoding="utf-8"))
    except (metadata.PackageNotFoundError, FileNotFoundError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _names_file(library: str, kind: str) -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "clipcluster" / "names" / f"{library}-{_version(library)}-{kind}.json"


@cache
def _version(library: str) -> str:
    """The installed version: by the name of its folder, since parsing the metadata takes 20 times as long."""
    spec = find_spec(library)
    site = Path(spec.origin).parents[1] if spec and spec.origin else Path()
    found = [folder.stem.removeprefix(f"{library}-") for folder in site.glob(f"{library}-*.dist-info")]
    return found[0] if len(found) == 1 else metadata.version(library)


def check_hub_name(name: str, patterns: Sequence[str], assets: Path) -> str:
    """Check a folder, or a name on the hub; "", or why it cannot be checked here.

    Args:
        name: as in the recipe.
        patterns: of files, one of which must be there: `TOKENIZER` or `CONFIGURATION`.
        assets: folder of files that an earlier submission of the run fetched (ORG--NAME for each); may be
            absent.

    Raises UserError for a folder without the files, and for a name that is not stored here while
    HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants

    folder = Path(name)
    if folder.is_file() and patterns is TOKENIZER:  # CLIP's vocabulary; the deep check reads it
        return ""
    if folder.is_dir():
        if any(next(folder.glob(pattern), None) for pattern in patterns):
            return ""
        raise UserError(f"the folder {name} has none of {', '.join(patterns)}")
    cache, stored = Path(constants.HF_HUB_CACHE), name.replace("/", "--")
    if (assets / stored).is_dir() or any(
        next(cache.glob(f"models--{stored}/snapshots/*/{pattern}"), None) for pattern in patterns
    ):
        return ""
    cached = [entry.name.removeprefix("models--").replace("--", "/") for entry in cache.glob("models--*")]
    near = nearest(name, cached)
    hint = f"; did you mean {near}, which is in the cache?" if near else ""
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{name!r} is not a folder and not in Hugging Face's cache ({cache}); HF_HUB_OFFLINE is set{hint}"
        )
    return f"{name!r} is not a folder and not in Hugging Face's cache: the hub is asked at submission{hint}"
