"""What one rank does with a run folder: train, or evaluate.

Nothing here loads torch until `train` or `evaluate` is called: a rank's signal handlers come first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipcluster.build.opened import find_model
from clipcluster.errors import StaleAttempt, UserError
from clipcluster.evals.headline import headline
from clipcluster.recipe.load import from_run, override
from clipcluster.recipe.sections.data import Source
from clipcluster.recipe.sections.evaluate import folders_of
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.checkpoints import STATE, name_of
from clipcluster.runs.evaluations import Owed, attempt_of, of_job, owed_by
from clipcluster.runs.files import read_json
from clipcluster.runs.folder import Run
from clipcluster.runtime.launch import Launch
from clipcluster.runtime.outcome import Outcome
from clipcluster.runtime.stop import Stop, Wish

if TYPE_CHECKING:
    import torch

    from clipcluster.evals.features import Measured
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
    with watched(recipe, attempt, world):
        return _train(run, attempt, launch, stop, recipe, world)


def _train(run: Run, attempt: Attempt, launch: Launch, stop: Stop, recipe: Recipe, world: World) -> Outcome:
    """The same once the ranks have met."""
    began = time.monotonic()
    if world.agree(stop.wishes()) & Wish.STOP:
        return _stopped(world, attempt, stop)
    attempt.phase(world.rank, "data")
    from clipcluster.build.data import check_shards, open_sources

    sources = open_sources(recipe, run.assets)
    if check_shards(sources.shards, world, stop) & Wish.STOP:
        return _stopped(world, attempt, stop)
    from clipcluster.build.training import (
        build_trainer,  # timm and transformers: seconds, after the ranks met
    )

    by_job = evaluated_by_job(recipe, launch)
    trainer = build_trainer(run, attempt, world, stop, recipe, sources, evaluated_by_job=by_job)
    outcome = trainer.run()
    if world.is_main:
        _summarise(run, trainer, outcome, time.monotonic() - began)
    world.leave()
    return outcome


def watched(recipe: Recipe, attempt: Attempt, world: World) -> AbstractContextManager[object]:
    """Inside, this rank ends where it makes no progress (`train.stalled_after`)."""
    from clipcluster.train.watchdog import Watchdog

    patience = recipe.train.stalled_after
    if patience is None:
        return nullcontext()
    return Watchdog(world.pulse, attempt, world.rank, world.size, patience.seconds)


def _stopped(world: World, attempt: Attempt, stop: Stop, during: str = "start-up") -> Outcome:
    """Stop where there is nothing to save; at start-up building may take longer than the grace time."""
    reason = f"{world.reason_to_stop(stop)} during {during}"
    if world.is_main:
        attempt.end("stopped", Outcome.STOPPED, reason)
    return Outcome.STOPPED


def evaluated_by_job(recipe: Recipe, launch: Launch) -> bool:
    """Whether evaluations are left to jobs of their own: the recipe says so, and something starts them."""
    if recipe.evaluate.where == "job" and launch.manager not in ("slurm", "local"):
        logger.info("evaluate.where is job, but nothing starts jobs here: the training evaluates itself")
        return False
    return recipe.evaluate.where == "job"


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


def evaluate_owed(run: Run, attempt: Attempt, launch: Launch, stop: Stop) -> Outcome:
    """One rank of a job that measures what a training left to it: the checkpoint of a step.

    `run` is the job's own run folder (`clipcluster.runs.evaluations`), with the training's recipe and the
    job's `cluster`. A stop leaves nothing behind: the next attempt measures again. Raises CheckpointError
    where the checkpoint does not verify, LostPeers, StaleAttempt, and what building the model raises.
    """
    from clipcluster.runtime.world import World

    owed = of_job(run)
    attempt.step = owed.step
    recipe = from_run(run.recipe(), attempt.settings())
    device = use_processors(recipe, launch)
    attempt.phase(launch.rank, "rendezvous")
    world = World.join(launch, publish=attempt.publish, find=attempt.find, device=device, timeout_s=SILENCE_S)
    with watched(recipe, attempt, world):
        return _evaluate_owed(owed, attempt, stop, recipe, world)


def _evaluate_owed(owed: Owed, attempt: Attempt, stop: Stop, recipe: Recipe, world: World) -> Outcome:
    """The same once the ranks have met."""
    if world.agree(stop.wishes()) & Wish.STOP:
        return _stopped(world, attempt, stop)
    if not world.while_main(lambda: attempt_of(owed) is not None):
        logger.info("the run no longer owes this evaluation: nothing is measured")
        world.leave()
        return Outcome.FINISHED
    attempt.phase(world.rank, "model")
    from clipcluster.build.evaluation import build_evaluations
    from clipcluster.train.evaluations import Interrupted

    evaluations, progress = build_evaluations(owed.run, recipe, owed.checkpoint, world)
    world.pulse.begin("evaluating")

    def tick() -> None:
        if world.agree(stop.wishes()) & Wish.STOP:
            raise Interrupted

    try:
        measured = evaluations.measure(progress, tick)
    except Interrupted:
        return _stopped(world, attempt, stop, "the evaluation")
    about = {**progress.counts(), "ema": evaluations.ema is not None}
    world.while_main(lambda: _settle(owed, attempt, about, measured))
    if world.is_main:
        _say_results(owed.run, owed.step, measured.metrics)
        _rotate_finished(owed.run, recipe, owed.checkpoint)
    world.leave()
    return Outcome.FINISHED


def _settle(owed: Owed, attempt: Attempt, about: Mapping[str, Any], measured: Measured) -> None:
    """Record the results where they are still owed, and let go of the checkpoint. Raises StaleAttempt."""
    from clipcluster.train.metrics import Board

    attempt.check()
    number = attempt_of(owed)
    if number is None:
        logger.warning("the run no longer owes this evaluation: the results are not recorded")
        return
    by = {"attempt": number, "job": attempt.job, "time": round(time.time(), 3)}
    details = {"step": owed.step, "attempt": number, "sets": measured.details}
    owed.settle({**about, **by, "metrics": measured.metrics}, details)
    board = Board(owed.run.tensorboard / "evaluations", f".{owed.name}")
    board.add("evaluation", {"step": owed.step, **measured.metrics})
    board.close()


def _rotate_finished(run: Run, recipe: Recipe, checkpoint: Path) -> None:
    """Where the training has finished, delete what its rotation kept for the evaluations alone."""
    from clipcluster.train.checkpoint import CheckpointFolder

    newest = run.newest()
    if newest is None or not run.finished():
        return
    folder = CheckpointFolder(newest, {})
    try:
        every = read_json(checkpoint / STATE)["plan"]["keep_every"]
        folder.rotate(recipe.checkpoint.keep, every, folder.steps()[-1])
    except FileNotFoundError:
        pass  # another evaluation that ends now deletes the same ones
    except (OSError, StaleAttempt) as error:  # the results are recorded: this job has done its work
        logger.warning("checkpoints that were kept for evaluations alone are not deleted: %s", error)


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
    if trainer.results:
        _say_results(run, done.evaluated_step, trainer.results)
    for owed in owed_by(run):
        step = f"{owed.step:,}"
        logger.info("step %s is evaluated by a job of its own: clipcluster status %s", step, run.name)
    logger.info("run folder: %s", run.path)


def _say_results(run: Run, step: int, results: Mapping[str, float]) -> None:
    """The figures of an evaluation that a person reads first, and where the others are."""
    shown = headline(results)
    for result in shown:
        logger.info("  %-32s %s", result.name, result.text)
    if len(results) > len(shown):
        file = run.evals / f"{name_of(step)}.json"
        logger.info("  and %d more, in %s", len(results) - len(shown), file)
