"""The recipe of a teacher that is given by its run. No torch."""

from __future__ import annotations

from pathlib import Path

from clipcluster.errors import UserError
from clipcluster.recipe.load import from_run
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.runs.checkpoints import step_of
from clipcluster.runs.folder import Run


def run_and_recipe(folder: Path) -> tuple[Run, Recipe]:
    """The run of a teacher, by its folder or by that of one of its checkpoints, and its recipe.

    Raises UserError where the folder is neither, and where the run has no image and text tower.
    """
    run = Run(folder.parent.parent if step_of(folder.name) is not None else folder)
    if not run.exists():
        raise UserError(
            f"{folder} is neither the folder of a run nor of one of its checkpoints "
            "(RUN/checkpoints/step-…); give one of these"
        )
    recipe = from_run(run.recipe(), run.settings())
    if not TASKS[recipe.task].captions:
        raise UserError(f"{run.name} is of task {recipe.task}; a teacher needs images and captions")
    return run, recipe
