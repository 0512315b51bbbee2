"""What one rank does with a run folder: train, or evaluate.

Nothing here loads torch until `train` or `evaluate` is called: a rank's signal handlers come first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipcluster.build.opened import find_model
from clipcluster.errors import UserError
from clipcluster.evals.headline import ordered
from clipcluster.recipe.load import from_run, override
from clipcluster.recipe.sections.data import Source
from clipcluster.recipe.sections.evaluate import folders_of
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.folder import Run
from clipcluster.runtime.launch import Launch
from clipcluster.runtime.outcome import Outcome
from clipcluster.runtime.stop import Stop, Wish

if TYPE_CHECKING:
    import torch

    from clipcluster.runtime.world import World
    from clipcluster.train.trainer import Trainer

logger = logging.getLogger("clipcluster")
SILENCE_S = 600.0
"""Seconds without an answer after which a rank counts as lost."""


def train(run: Run, attempt: Attempt, launch: Launch, stop: Stop) -> Outcome:
    """One rank of one attempt: train from the newest checkpoint until the end or an agreed stop.

    Raises what `Trainer.run` raises, and UserError or DataError where a part cannot be built.
    """
    from clipcluster.runtime.devices import describe
    from clipcluster.runtime.world import World

    recipe = from_run(run.recipe(), attempt.settings())
    device = use_processors(recipe, launch)
    attempt.event("device", writer=f"rank-{launch.rank}", device=describe(device))
    attempt.phase(launch.rank, "rendezvous")
    world = World.join(launch, publish=attempt.publish, find=attempt.find, device=device, timeout_s=SILENCE_S)
    began = time.monotonic()
    if world.agree(stop.wishes()) & Wish.STOP:
        return _stopped_early(world, attempt, stop)
    attempt.phase(world.rank, "data")
    from clipcluster.build.data import check_shards, open_sources

    sources = open_sources(recipe, run.assets)
    if check_shards(sources.shards, world, stop) & Wish.STOP:
        return _stopped_early(world, attempt, stop)
    from clipcluster.build.training import (
        build_trainer,  # timm and transformers: seconds, after the ranks met
    )

    trainer = build_trainer(run, attempt, world, stop, recipe, sources)
    outcome = trainer.run()
    if world.is_main:
        _summarise(run, trainer, outcome, time.monotonic() - began)
    world.leave()
    return outcome


def _stopped_early(world: World, attempt: Attempt, stop: Stop) -> Outcome:
    """Stop while starting up: there is nothing to save, and building may take longer than the grace time."""
    reason = f"{world.reason_to_stop(stop)} during start-up"
    if world.is_main:
        attempt.end("stopped", Outcome.STOPPED, reason)
    return Outcome.STOPPED


def use_processors(recipe: Recipe, launch: Launch) -> torch.device:
    """This rank's device, with threads from the node's cores and kernels as the recipe wants them."""
    from clipcluster.runtime import devices

    # SLURM grants the GPUs that were requested: a node without one is broken.
    required = launch.manager == "slurm"
    device = devices.pick_device(launch.local_rank, per_node=recipe.cluster.gpus_per_node, required=required)
    wanted, usable = recipe.cluster.cpus_per_task, devices.usable_cores(launch.local_size)
    devices.set_threads(min(wanted, usable))
    if wanted > usable:
        logger.warning(
            "cluster.cpus_per_task is %d, and this rank has %d of the node's cores: it uses %d threads",
            wanted,
            usable,
            usable,
        )
    repeatable = devices.choose_kernels(device, recipe.train.deterministic)
    logger.info("device: %s, %s kernels", devices.describe(device), "deterministic" if repeatable else "fast")
    return device


def evaluate(
    what: str | Path,
    *,
    overrides: Sequence[str] = (),
    weights: Literal["ema", "raw"] | None = None,
    runs: Path | None = None,
) -> dict[str, Any]:
    """Measure a model, also of a run that is training, in this process; nothing is written.

    `what`: a run, of which the newest checkpoint that verifies is taken, a checkpoint, or another program's
    model (`clipcluster.build.opened`). `overrides`: `key=value` over its recipe, of a run with its settings
    as last submitted; the `evaluate` section says what is measured. `weights`: the moving average or the
    weights themselves; default the average where there is one. `runs`: where runs are looked for by name.

    Returns `run` (its name; None for another program's model), `checkpoint` (the folder), `step` (or None),
    `ema` (whether averaged weights were measured) and `metrics` (SET/METRIC -> value). Raises UserError where
    there is nothing to measure, of a run before torch is loaded.
    """
    found = find_model(what, runs)
    recipe = override(found.recipe, overrides)
    _require_measurable(recipe)
    import torch

    from clipcluster.evals.suite import build_suite
    from clipcluster.runtime.devices import pick_device
    from clipcluster.runtime.world import World
    from clipcluster.train.precision import Precision

    world = World(0, 1, 0, pick_device(0))
    opened = replace(found, recipe=recipe).open(weights=weights, device=world.device)
    suite = build_suite(recipe, world=world, tokenizer=opened.tokenizer)
    precision = Precision(recipe.train.precision, world.device)
    precision.prepare(opened.model)
    with torch.no_grad(), precision.autocast():
        metrics = suite.run(opened.model).metrics
    return {
        "run": opened.name if opened.step is not None else None,
        "checkpoint": str(opened.path),
        "step": opened.step,
        "ema": opened.averaged,
        "metrics": metrics,
    }


def _require_measurable(recipe: Recipe) -> None:
    """UserError where the recipe has no evaluation whose shards can be opened."""
    from clipcluster.data.shards.open import open_source

    kinds = TASKS[recipe.task].evaluations
    named = [own for kind in kinds for entry in recipe.evaluate.entries(kind) for own in folders_of(entry)]
    if not named:
        keys = " or ".join(f"evaluate.{kind}" for kind in kinds)
        raise UserError(f"There is nothing to measure: name shard folders in {keys}.")
    for folder in dict.fromkeys(named):
        open_source(Source(shards=folder), text=folder in recipe.evaluate.retrieval)


def _summarise(run: Run, trainer: Trainer, outcome: Outcome, seconds: float) -> None:
    """Log the state and the results of the run on rank 0, at the end of an attempt."""
    done = trainer.progress
    logger.info(
        "%s at step %s of %s (%s samples, %.2f epochs) after %.1f s of this attempt",
        outcome.name.lower(),
        f"{done.step:,}",
        f"{trainer.total_steps:,}",
        f"{done.samples:,}",
        done.epoch,
        seconds,
    )
    for kind, results in ordered(trainer.results).items():
        logger.info("%s: %s", kind.title, kind.explanation)
        for result in results:
            logger.info("  %-32s %s", result.name, result.text)
    logger.info("run folder: %s", run.path)
