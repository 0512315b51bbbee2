"""The task `distill` with its teachers, and the samples as they take them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcluster.build.model import build_model, load_weights
from clipcluster.data.images.transforms import TrainTransform
from clipcluster.data.loading.preparation import Preparation, Retokenized
from clipcluster.data.loading.stored import StoredPreparation
from clipcluster.data.tokenizer import Tokenizer, load_tokenizer
from clipcluster.errors import UserError
from clipcluster.model.distill import DistillTask, Teacher
from clipcluster.model.protocols import DualEncoder
from clipcluster.model.task import build_contrastive
from clipcluster.recipe.load import from_run
from clipcluster.recipe.sections.distill import RunTeacher
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.runs.checkpoints import step_of, weights_file
from clipcluster.runs.folder import Run
from clipcluster.runtime.world import World

logger = logging.getLogger("clipcluster")


@dataclass(frozen=True)
class Source:
    """Where a teacher comes from: its recipe, its assets, and the run and checkpoint that its weights are of.

    names: of its tokens and their mask in `batch.extras`, None where they are the student's.
    """

    number: int
    recipe: Recipe
    assets: Path | None
    names: tuple[str, str] | None
    run: Run | None = None
    checkpoint: Path | None = None


def build_distill(recipe: Recipe, model: DualEncoder, ranks: World, assets: Path | None) -> DistillTask:
    """`task: distill`. UserError as `build_contrastive`, and where a teacher cannot be built or loaded."""
    assert recipe.distill is not None
    student = build_contrastive(recipe, model, ranks, assets)
    teachers, frozen = [], {}
    for source, section in zip(_sources(recipe, assets), recipe.distill.teachers, strict=True):
        taught, file = _loaded(source)
        frozen[f"teacher {source.number}"] = file
        image = source.recipe.data.image
        teachers.append(
            Teacher(
                taught,
                size=image.size,
                mean=image.mean,
                std=image.std,
                tokens=source.names,
                scale=section.scale,
            )
        )
    return DistillTask(student, recipe.distill, teachers, frozen, recipe.seed)


def build_preparation(
    recipe: Recipe, transform: TrainTransform, tokenizer: Tokenizer, assets: Path | None
) -> Preparation:
    """The preparation of `task: distill`: stored augmentations, or what the teachers' tokenizers make."""
    assert recipe.distill is not None
    if recipe.distill.stored is not None:
        return StoredPreparation(transform, tokenizer, recipe.distill.stored)
    own = {
        source.names: load_tokenizer(source.recipe.data.text, source.assets)
        for source in _sources(recipe, assets)
        if source.names is not None
    }
    return Retokenized(transform, own)


def _sources(recipe: Recipe, assets: Path | None) -> list[Source]:
    """The teachers in the order of the recipe. UserError where a folder is neither a run nor a checkpoint."""
    assert recipe.distill is not None
    given, found = recipe.teachers(), []
    for number, section in enumerate(recipe.distill.teachers):
        run: Run | None = None
        checkpoint: Path | None = None
        taught, of_it = given.get(number), assets
        if isinstance(section, RunTeacher):
            run, checkpoint = _run_of(Path(section.run), number)
            taught, of_it = from_run(run.recipe(), run.settings()), run.assets
            if not TASKS[taught.task].captions:
                raise UserError(
                    f"distill.teachers.{number}.run: {run.name} is of task {taught.task}; a teacher "
                    "needs images and captions"
                )
        assert taught is not None
        text, own = taught.data.text, recipe.data.text
        same = (text.tokenizer, text.context_length) == (own.tokenizer, own.context_length)
        names = None if same else (f"teacher-{number}-tokens", f"teacher-{number}-mask")
        found.append(Source(number, taught, of_it, names, run, checkpoint))
    return found


def _run_of(folder: Path, number: int) -> tuple[Run, Path | None]:
    """The run that a folder is, or whose checkpoint it is, and that checkpoint."""
    if step_of(folder.name) is not None:
        path, checkpoint = folder.parent.parent, folder
    else:
        path, checkpoint = folder, None
    if not (path / "recipe.yaml").is_file():
        raise UserError(
            f"distill.teachers.{number}.run: {folder} is neither the folder of a run nor of one of its "
            "checkpoints (RUN/checkpoints/step-…); give one of these"
        )
    return Run(path), checkpoint


def _loaded(source: Source) -> tuple[Any, Path]:
    """A teacher's model with its weights, and the file or folder that they are from."""
    key = f"distill.teachers.{source.number}"
    tokenizer = load_tokenizer(source.recipe.data.text, source.assets)
    model = build_model(source.recipe, tokenizer, source.assets, starting_weights=source.run is None)
    if source.run is not None:
        checkpoint, step, averaged = load_weights(source.run, model, source.checkpoint)
        file, _ = weights_file(checkpoint)
        logger.info(
            "teacher %d: %s weights of %s, step %s",
            source.number,
            "averaged" if averaged else "raw",
            source.run.name,
            f"{step:,}",
        )
        return model, file
    whole = [coverage for coverage in model.starting_weights if coverage.tower == "model"]
    if not whole:
        raise UserError(
            f"{key}.model: a teacher needs weights of the whole model, its projections included; set "
            f"{key}.model.weights"
        )
    logger.info("teacher %d: %s", source.number, whole[0])
    return model, Path(whole[0].file)
