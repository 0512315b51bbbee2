"""The evaluations of a recipe, run one after the other by all ranks together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from clipcluster.data.loading.loader import evaluation_batches
from clipcluster.data.shards.open import open_folder
from clipcluster.data.storage.cache import Cache
from clipcluster.data.storage.urls import redacted
from clipcluster.evals.classification import classification
from clipcluster.evals.features import Context, EvaluationSet, Measured, Tick
from clipcluster.evals.headline import named_sets, set_names
from clipcluster.evals.probe import probe
from clipcluster.evals.prompts import check_count, class_names, templates
from clipcluster.evals.retrieval import retrieval
from clipcluster.evals.zero_shot import zero_shot
from clipcluster.model.protocols import Model
from clipcluster.recipe.sections.evaluate import Entry, Probe, ZeroShot, folders_of
from clipcluster.recipe.tasks import METRICS, RAW

if TYPE_CHECKING:
    from clipcluster.data.tokenizer import Tokenizer
    from clipcluster.recipe.sections.recipe import Recipe
    from clipcluster.runtime.world import World

logger = logging.getLogger("clipcluster")
Measure = Callable[[Any, EvaluationSet, Context, Tick], Measured]
KINDS: dict[str, Measure] = {
    "zero_shot": zero_shot,
    "retrieval": retrieval,
    "classification": classification,
    "probe": probe,
}


class Suite:
    """All evaluations of a run, each a kind of measure on one set; every rank holds the same."""

    def __init__(self, evaluations: Sequence[tuple[str, EvaluationSet]], context: Context) -> None:
        self.evaluations = tuple(evaluations)
        self.context = context

    def __bool__(self) -> bool:
        return bool(self.evaluations)

    @torch.no_grad()
    def run(
        self,
        model: Model,
        progress: Any = None,
        *,
        tick: Tick = lambda: None,
        averaged: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> Measured:
        """Measure a model (without DDP around it): SET/METRIC -> value, the same on every rank.

        The details are by set and kind (SET -> {KIND: …}), of the weights that count.

        Every rank calls it, with the same weights. `tick` is called between batches, equally often on all
        ranks, and leaves the evaluation by raising. The model is left as it was found, training or not.
        Inside `averaged` the model has other weights, which are then what is measured; the kinds with metrics
        of the raw weights are measured with these too, and their metrics begin with `RAW`.
        """
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with averaged() if averaged else nullcontext():
                measured = self._measured(model, self.evaluations, progress, tick)
            if averaged:
                again = [(kind, images) for kind, images in self.evaluations if _raw_metrics(kind)]
                raw = self._measured(model, again, progress, tick).metrics
                for kind, images in again:
                    for metric in _raw_metrics(kind):
                        if (name := f"{images.name}/{metric.removeprefix(RAW)}") in raw:
                            measured.metrics[f"{images.name}/{metric}"] = raw[name]
        finally:
            for module, training in modes:  # frozen parts of a model in training are in evaluation mode
                module.training = training
        return measured

    def _measured(
        self,
        model: Model,
        evaluations: Sequence[tuple[str, EvaluationSet]],
        progress: Any,
        tick: Tick,
    ) -> Measured:
        """What these evaluations find, with the weights that the model has."""
        found = Measured({})
        for kind, images in evaluations:
            tick()
            if self.context.world.is_main:
                step = f" at step {progress.step}" if progress is not None else ""
                logger.info("%s on %s%s: %d images", kind, images.name, step, images.samples)
            measured = KINDS[kind](model, images, self.context, tick)
            found.metrics.update({f"{images.name}/{name}": own for name, own in measured.metrics.items()})
            if measured.details:
                found.details.setdefault(images.name, {})[kind] = measured.details
        return found


def _raw_metrics(kind: str) -> list[str]:
    return [metric for metric in METRICS[kind] if metric.startswith(RAW)]


def build_suite(recipe: Recipe, *, world: World, tokenizer: Tokenizer | None) -> Suite:
    """The evaluations named in the recipe's `evaluate` section; its paths are absolute.

    Raises UserError where a folder has no index or cannot be opened, and for class names and templates that
    cannot be read.
    """
    section = recipe.evaluate
    chosen = named_sets(section)
    opened = {
        folder: _open(folder, name, recipe, world)
        for folder, name in set_names(
            folder for _, entry, _ in chosen for folder in folders_of(entry)
        ).items()
    }
    evaluations = [(kind, _set_of(entry, name, opened)) for kind, entry, name in chosen]
    image, per_rank = recipe.data.image, max(1, section.batch_size // world.size)
    context = Context(world, tokenizer, image.mean, image.std, per_rank)
    return Suite(evaluations, context)


def _set_of(entry: Entry, name: str, opened: Mapping[str, EvaluationSet]) -> EvaluationSet:
    """The set of one entry, with the class names and templates that it gives, or what a probe trains on."""
    found = replace(opened[folders_of(entry)[0]], name=name)
    if isinstance(entry, Probe):
        return replace(found, train=opened[entry.train])
    if isinstance(entry, ZeroShot) and entry.classnames:
        names = class_names(entry.classnames)
        check_count(entry.classnames, len(names), found.classnames)
        found = replace(found, classnames=names)
    if isinstance(entry, ZeroShot) and entry.templates:
        found = replace(found, templates=templates(entry.templates))
    return found


def _open(folder: str, name: str, recipe: Recipe, world: World) -> EvaluationSet:
    shards = open_folder(folder, cache=Cache.of(recipe.data.cache))
    batches = partial(
        evaluation_batches,
        shards,
        recipe.data,
        world=world,
        batch_size=recipe.evaluate.batch_size,
        workers=recipe.data.workers,
    )
    return EvaluationSet(
        name=name,
        folder=redacted(folder),
        samples=shards.n_samples,
        batches=batches,
        classnames=shards.classnames,
        templates=shards.templates,
    )
