"""The task `distill` with its teachers, and the preparation of samples for them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcluster.build.model import build_model
from clipcluster.build.teacher_runs import run_and_recipe
from clipcluster.data.images.transforms import TrainTransform
from clipcluster.data.loading.preparation import Preparation, Retokenized
from clipcluster.data.loading.stored import StoredPreparation
from clipcluster.data.tokenizer import Tokenizer, load_tokenizer
from clipcluster.errors import UserError
from clipcluster.model.distill import DistillTask, Teacher
from clipcluster.model.protocols import DualEncoder
from clipcluster.model.task import build_contrastive
from clipcluster.model.towers import foreign_tokenizer
from clipcluster.recipe.sections.distill import RunTeacher
from clipcluster.recipe.sections.model import Model
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.runs.checkpoints import name_of, newest_complete
from clipcluster.runtime.world import World

logger = logging.getLogger("clipcluster")


@dataclass(frozen=True)
class TeacherSource:
    """A teacher's recipe, whose `model.weights` are the teacher's, and its assets.

    names: the names of the teacher's tokens and their mask in `batch.extras`; None where the tokens are the
    student's.
    """

    recipe: Recipe
    assets: Path | None
    names: tuple[str, str] | None


def build_distill(recipe: Recipe, model: DualEncoder, ranks: World, assets: Path | None) -> DistillTask:
    """`task: distill`. UserError as `build_contrastive`, and where a teacher cannot be built or loaded."""
    assert recipe.distill is not None
    student = build_contrastive(recipe, model, ranks, assets)
    teachers, frozen = [], {}
    for number, source in enumerate(_sources(recipe, assets)):
        frozen_model, file = _loaded(source, ranks, f"distill.teachers.{number}")
        frozen[f"teacher {number}"] = file
        image, scale = source.recipe.data.image, recipe.distill.teachers[number].scale
        teachers.append(
            Teacher(
                frozen_model,
                size=image.size,
                mean=image.mean,
                std=image.std,
                tokens=source.names,
                scale=scale,
            )
        )
    return DistillTask(student, recipe.distill, teachers, frozen, recipe.seed)


def build_preparation(
    recipe: Recipe, transform: TrainTransform, tokenizer: Tokenizer, assets: Path | None
) -> Preparation:
    """The preparation of `task: distill`: stored augmentations, or captions for the teachers' tokenizers."""
    assert recipe.distill is not None
    if recipe.distill.stored is not None:
        return StoredPreparation(transform, tokenizer, recipe.distill.stored)
    own = {
        source.names: load_tokenizer(source.recipe.data.text, source.assets)
        for source in _sources(recipe, assets)
        if source.names is not None
    }
    return Retokenized(transform, own)


def _sources(recipe: Recipe, assets: Path | None) -> list[TeacherSource]:
    """The teachers in the order of the recipe. UserError where a folder is neither a run nor a checkpoint."""
    assert recipe.distill is not None
    given, found = recipe.teachers(), []
    for number, section in enumerate(recipe.distill.teachers):
        teacher, teacher_assets = given.get(number), assets
        if isinstance(section, RunTeacher):
            teacher, teacher_assets = _of_run(Path(section.run), f"distill.teachers.{number}.run")
        assert teacher is not None
        text, own = teacher.data.text, recipe.data.text
        keys = ("tokenizer", "context_length", "clean")
        same = all(getattr(text, key) == getattr(own, key) for key in keys)
        names = None if same else (f"teacher-{number}-tokens", f"teacher-{number}-mask")
        found.append(TeacherSource(teacher, teacher_assets, names))
    return found


def _of_run(folder: Path, key: str) -> tuple[Recipe, Path]:
    """The recipe and the assets of a run, by its folder or by that of one of its checkpoints."""
    try:
        run, recipe = run_and_recipe(folder)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    return recipe.model_copy(update={"model": _starting_with(recipe.model, folder)}), run.assets


def _starting_with(model: Model, weights: Path) -> Model:
    """The same model section, with these weights and no others."""
    parts = {name: getattr(model, name) for name in ("image", "text", "dual")}
    bare = {name: own.model_copy(update={"weights": None}) for name, own in parts.items() if own is not None}
    return model.model_copy(update={**bare, "weights": str(weights), "weights_from": None, "missing": ()})


def _loaded(source: TeacherSource, ranks: World, key: str) -> tuple[Any, Path]:
    """A teacher's model with its weights, and their file or folder."""
    recipe, given = source.recipe, source.recipe.model.weights
    if given is not None and (Path(given) / "checkpoints").is_dir():  # rank 0 chooses: it may be training
        newest = ranks.broadcast(newest_complete(Path(given) / "checkpoints"))
        if newest is None:
            raise UserError(f"{key}: the run {given} has no checkpoint yet")
        chosen = _starting_with(recipe.model, Path(given) / "checkpoints" / name_of(newest))
        recipe = recipe.model_copy(update={"model": chosen})
    tokenizer = load_tokenizer(recipe.data.text, source.assets)
    model = build_model(recipe, tokenizer, source.assets)
    whole = [coverage for coverage in model.starting_weights if coverage.tower == "model"]
    if not whole:
        raise UserError(
            f"{key}.model: a teacher needs weights of the whole model, its projections included; set "
            f"{key}.model.weights"
        )
    foreign = foreign_tokenizer(model.text, tokenizer) if recipe.model.dual else ""
    if foreign:
        raise UserError(f"{key}.text.tokenizer: {foreign}")
    logger.info("teacher %s: %s", key.rpartition(".")[2], whole[0])
    return model, Path(whole[0].file)
