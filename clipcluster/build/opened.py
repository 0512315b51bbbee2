"""A model with its weights, recipe and tokenizer, opened from any kind of model folder.

Nothing here loads torch before a model is built, so that a folder without one is refused at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipcluster.errors import UserError
from clipcluster.recipe.load import from_mapping, from_run
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.runs.checkpoints import MANIFEST, is_complete, name_of, steps_in
from clipcluster.runs.files import read_object
from clipcluster.runs.folder import Run
from clipcluster.runs.names import all_runs, find_run, runs_folder

if TYPE_CHECKING:
    import torch

    from clipcluster.data.tokenizer import Tokenizer

EXPECTED = (
    "a run, one of its checkpoints, a dual encoder's folder in Hugging Face's layout (config.json), or an "
    "OpenCLIP folder (open_clip_config.json)"
)
_NO_NAME = re.compile(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Opened:
    """A model ready for use.

    model: in evaluation mode, on its device (`clipcluster.model.protocols` has what it can do).
    recipe: that of its run; for another program's model one whose sections `model`, `data.image` and
    `data.text` describe it. tokenizer: None for a classifier.
    path: the checkpoint's folder, or the model's. step: None where the model is no checkpoint of a run.
    averaged: whether the weights are a moving average. name: the run's, or the folder's.
    assets: the run's tokenizers and configurations.
    """

    model: Any
    recipe: Recipe
    tokenizer: Tokenizer | None
    path: Path
    step: int | None
    averaged: bool
    name: str
    assets: Path | None = None


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a model, before any weights are read; attributes as in `Opened`.

    checkpoints: the folders with the weights, newest first; empty where `recipe.model` names the weights.
    """

    recipe: Recipe
    path: Path
    name: str
    assets: Path | None = None
    checkpoints: Sequence[Path] = ()

    def open(
        self, *, weights: Literal["ema", "raw"] | None = None, device: torch.device | str | None = None
    ) -> Opened:
        """Build the model and read its weights, of several checkpoints those of the newest that verifies.

        weights: the moving average or the weights themselves; default the average where there is one.
        device: default an accelerator where there is one. Raises UserError where the model cannot be built,
        and where weights are missing, damaged, or another model's.
        """
        from clipcluster.build.model import build_model, load_checkpoint
        from clipcluster.data.tokenizer import load_tokenizer
        from clipcluster.model.hugging_face import refusing
        from clipcluster.runtime.devices import pick_device

        recipe = self.recipe
        if weights and not self.checkpoints:
            recipe = recipe.model_copy(
                update={"model": recipe.model.model_copy(update={"weights_from": weights})}
            )
        tokenizer = load_tokenizer(recipe.data.text, self.assets) if TASKS[recipe.task].captions else None
        with nullcontext() if self.checkpoints else refusing(f"The model of {self.path} cannot be built"):
            model = build_model(recipe, tokenizer, self.assets, starting_weights=not self.checkpoints)
        path, step = self.path, None
        averaged = any(coverage.part == "ema" for coverage in model.starting_weights)
        if self.checkpoints:  # of a run those of now: its training may have deleted the ones found before
            checkpoints = _newest_first(Run(self.path)) or self.checkpoints
            path, step, averaged = load_checkpoint(model, checkpoints, weights)
        model.eval().to(device or pick_device(0))
        return Opened(model, recipe, tokenizer, path, step, averaged, self.name, self.assets)


def find_model(what: str | Path, runs: Path | None = None) -> ModelFolder:
    """The model that `what` names: a folder as for `model_folder`, or a run in `runs` as for `find_run`."""
    folder, name, within = Path(what), str(what), runs_folder(runs)
    known = any(is_one(folder.absolute()) for is_one, _ in _KINDS)
    if known or os.sep in name or folder.is_file():  # a run's name has no separator
        return model_folder(folder)
    if folder.is_dir() and not any(run.name.startswith(name) for run in all_runs(within)):
        return model_folder(folder)
    return _of_run(find_run(name, within))


def model_folder(what: Path) -> ModelFolder:
    """What a folder holds: a run, a checkpoint of one (also copied elsewhere), or another program's model.

    UserError where it is none of these, a run without a checkpoint, or an incomplete checkpoint.
    """
    folder = what.absolute()
    for is_one, describe in _KINDS:
        if is_one(folder):
            return describe(folder)
    exported = (read_object(folder / "export.json") or {}).get("format") if folder.is_dir() else None
    if exported:
        raise UserError(
            f"{what} is an export of format {exported}, which is not read here; give the run that it was "
            "made from, or an export of format hf or open_clip."
        )
    wrong = "contains no model" if folder.is_dir() else "is not a folder"
    raise UserError(f"{what} {wrong}; give {EXPECTED}.")


def _of_run(run: Run) -> ModelFolder:
    recipe = from_run(run.recipe(), run.settings())
    found = _newest_first(run)
    if not found:
        raise UserError(
            f"{run.name} has no checkpoint: none was written yet. Wait for its first (clipcluster status)."
        )
    return ModelFolder(recipe, run.path, run.name, run.assets, found)


def _newest_first(run: Run) -> list[Path]:
    return [run.checkpoints / name_of(step) for step in reversed(steps_in(run.checkpoints))]


def _of_checkpoint(folder: Path) -> ModelFolder:
    run = Run(folder.parent.parent)
    if run.exists():
        if not is_complete(folder):
            names = [name_of(step) for step in reversed(steps_in(run.checkpoints))]
            names = [name for name in names if is_complete(run.checkpoints / name)]
            there = ", ".join(names) or "none"
            raise UserError(f"{folder} is not a complete checkpoint; {run.name} has {there}.")
        return replace(_of_run(run), path=folder, checkpoints=(folder,))
    recipe = (read_object(folder / MANIFEST) or {}).get("recipe")
    if not isinstance(recipe, dict):
        raise UserError(
            f"{folder} is not in a run folder (RUN/checkpoints/step-…), and its {MANIFEST} has no recipe, "
            "which says what model its weights are of. Move it back into its run, or name the run."
        )
    own = from_mapping(recipe, str(folder / MANIFEST))
    return ModelFolder(own, folder, f"{own.name} {folder.name}", None, (folder,))


def _of_hugging_face(folder: Path) -> ModelFolder:
    from clipcluster.build.hugging_face_folder import recipe_of
    from clipcluster.model.hugging_face import refusing

    with refusing(f"{folder} cannot be read as a model of Hugging Face's"):
        return described(folder, recipe_of(folder))


def _of_open_clip(folder: Path) -> ModelFolder:
    from clipcluster.build.open_clip_folder import recipe_of
    from clipcluster.model.hugging_face import refusing

    with refusing(f"{folder} cannot be read as a model of OpenCLIP's"):
        return described(folder, recipe_of(folder))


def described(folder: Path, sections: Mapping[str, Any]) -> ModelFolder:
    """Another program's model by its sections `data` and `model`, and `loss` where it needs one.

    The sections that only training needs are filled in with placeholders: nothing can be trained by it.
    """
    filled: dict[str, Any] = {
        "name": _NO_NAME.sub("-", folder.name).strip("-._")[:100] or "model",
        "optim": {"lr": 0.0},
        "train": {"duration": "1 steps"},
        **sections,
        "data": {"train": [{"shards": str(folder)}], "batch_size": 1, **sections["data"]},
    }
    return ModelFolder(from_mapping(filled, str(folder)), folder, folder.name)


def _is_checkpoint(folder: Path) -> bool:
    run = Run(folder.parent.parent)
    return (folder.parent == run.checkpoints and run.exists()) or (folder / MANIFEST).is_file()


_KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path], ModelFolder]], ...] = (
    (lambda folder: Run(folder).exists(), lambda folder: _of_run(Run(folder))),
    (_is_checkpoint, _of_checkpoint),
    # Before config.json: some folders on the hub are both programs', with weights by OpenCLIP's names.
    (lambda folder: (folder / "open_clip_config.json").is_file(), _of_open_clip),
    (lambda folder: (folder / "config.json").is_file(), _of_hugging_face),
)
"""(test for a kind of folder, function that describes one) in order; the first test that holds decides."""
