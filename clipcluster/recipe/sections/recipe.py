"""The whole recipe: the table of its sections. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import WithJsonSchema

from clipcluster.recipe.sections.base import Section, key, section
from clipcluster.recipe.sections.checkpoint import Checkpoint
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.recipe.sections.data import Data
from clipcluster.recipe.sections.evaluate import Evaluate
from clipcluster.recipe.sections.model import Model
from clipcluster.recipe.sections.optim import Optim
from clipcluster.recipe.sections.train import Train
from clipcluster.recipe.sections.values import Int
from clipcluster.recipe.tasks import TASKS

TaskName = Annotated[  # type: ignore[valid-type]
    Literal[tuple(TASKS)],
    WithJsonSchema({"type": "string", "enum": sorted(TASKS)}),
]


class Recipe(Section):
    """One training run."""

    name: str = key(
        "record",
        "Name of the run; its folder is the name and eight digits of a hash.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
    )
    task: TaskName = key("result", "What the model is trained for.", "contrastive")  # type: ignore[valid-type]
    seed: Int = key("result", "Seed of all random numbers.", 0, ge=0, lt=2**63)
    data: Data = section("The training data.")
    model: Model = section("The towers and the embedding they share.")
    optim: Optim = section("The optimizer and its schedule.")
    train: Train = section("Length, precision and log of the run.")
    checkpoint: Checkpoint = section("When to save, and what to keep.", {})
    evaluate: Evaluate = section("What is measured, and when.", {})
    cluster: Cluster = section("Where the run takes place.", {})
