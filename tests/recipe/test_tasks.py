"""The table of tasks agrees with what is built and measured."""

from __future__ import annotations

from pkgutil import resolve_name
from types import SimpleNamespace

from clipcluster.evals.suite import KINDS
from clipcluster.recipe.sections.distill import Distill, Stored
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import METRICS, TASKS


def test_every_task_can_be_named_by_a_recipe_and_be_built() -> None:
    assert Recipe.model_json_schema()["properties"]["task"]["enum"] == sorted(TASKS)
    distill = SimpleNamespace(distill=Distill(stored=Stored()))
    for spec in TASKS.values():
        assert callable(resolve_name(spec.builder))
        assert callable(resolve_name(spec.model))
        assert all(callable(resolve_name(decoder)) for decoder in spec.members(distill).values())
        assert spec.preparation is None or callable(resolve_name(spec.preparation))
        assert set(spec.evaluations) <= METRICS.keys()


def test_every_evaluation_has_its_metrics() -> None:
    assert list(METRICS) == list(KINDS)
