"""Tokenizers and configurations that a recipe names on a hub, fetched at submission: nodes may be offline."""

from __future__ import annotations

import shutil
from pathlib import Path

from clipcluster.errors import UserError
from clipcluster.recipe.sections.model import Dual, HfImageTower, HfTextTower
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.runs import files

HASHES = "hashes.json"  # SHA-256 of every fetched file
TOKENIZER = ("*.json", "*.txt", "*.model", "*.tiktoken")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


def hub_names(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """What is to be fetched: the name on the hub -> patterns of its files. Local folders are not."""
    names: dict[str, tuple[str, ...]] = {}
    tokenizer = recipe.data.text.tokenizer
    if TASKS[recipe.task].captions and tokenizer != "bytes" and not Path(tokenizer).exists():
        names[tokenizer] = TOKENIZER
    for tower in (recipe.model.image, recipe.model.text, recipe.model.dual):
        if isinstance(tower, HfImageTower | HfTextTower | Dual) and not Path(tower.hf).exists():
            more = WEIGHTS if tower.weights == "pretrained" else ()
            names[tower.hf] = (*names.get(tower.hf, ("config.json",)), *more)
    for teacher in recipe.teachers().values():
        for name, patterns in hub_names(teacher).items():
            names[name] = tuple(dict.fromkeys((*names.get(name, ()), *patterns)))
    return names


def fetch(recipe: Recipe, folder: Path) -> list[str]:
    """Fetch what is missing in `folder` (ORG--NAME for each); returns the names that were fetched.

    Raises UserError where the hub cannot be reached or knows no such name.
    """
    fetched = []
    for name, patterns in hub_names(recipe).items():
        target = folder / name.replace("/", "--")
        if not target.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            _fetch(name, target, patterns)
            fetched.append(name)
    if fetched:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != HASHES]
        hashes = {str(path.relative_to(folder)): files.file_sha256(path) for path in paths}
        files.write_json(folder / HASHES, hashes)
    return fetched


def _fetch(name: str, target: Path, patterns: tuple[str, ...]) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    aside = target.with_name(f".{target.name}.part")  # what is fetched in part is no asset; it is resumed
    try:
        snapshot_download(name, local_dir=aside, allow_patterns=list(patterns))
        shutil.rmtree(aside / ".cache", ignore_errors=True)
        aside.rename(target)
    except (OSError, ValueError, HFValidationError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name} is not a folder here, and it could not be fetched from the hub: {first}\n"
            "Give a folder with its files or a name that the hub knows, or submit where it can be reached."
        ) from None
