"""The task of a recipe: what turns its batches into a loss."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

from clipcluster.model.protocols import DualEncoder
from clipcluster.model.task import ContrastiveTask, Task
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.runtime.world import World


def build_task(recipe: Recipe, model: Any, ranks: World) -> Task:
    """The task that the recipe names, around its model."""
    task: Task = resolve_name(TASKS[recipe.task].builder)(recipe, model, ranks)
    return task


def contrastive(recipe: Recipe, model: DualEncoder, ranks: World) -> ContrastiveTask:
    """`task: contrastive`."""
    return ContrastiveTask(model, recipe.data.image.mean, recipe.data.image.std, ranks)
