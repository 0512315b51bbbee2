"""The task of a recipe: what a step computes, and how the ranks share its gradients."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS

if TYPE_CHECKING:
    from clipcluster.model.losses import Ranks
    from clipcluster.model.protocols import DualEncoder
    from clipcluster.model.task import ContrastiveTask, Task


def build_task(recipe: Recipe, model: Any, ranks: Ranks) -> Task:
    """The task that the recipe names, around its model."""
    task: Task = resolve_name(TASKS[recipe.task].builder)(recipe, model, ranks)
    return task


def contrastive(recipe: Recipe, model: DualEncoder, ranks: Ranks) -> ContrastiveTask:
    """`task: contrastive`."""
    from clipcluster.model.task import ContrastiveTask

    return ContrastiveTask(model, recipe.data.image.mean, recipe.data.image.std, ranks)
