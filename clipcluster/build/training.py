"""Building the trainer of a run from its recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from clipcluster.build.data import Sources, open_batches, open_sources
from clipcluster.build.model import build_model, build_start, build_task, describe_plan, hash_of
from clipcluster.build.optimizer import build_optimizer, build_schedule, try_optimizer
from clipcluster.build.stages import build_stages, check_loaded
from clipcluster.data.loading.loader import Loader
from clipcluster.data.storage.urls import redacted_within
from clipcluster.evals.suite import build_suite
from clipcluster.model.activation_checkpointing import checkpoint_activations
from clipcluster.model.norms import group_batch_norms, require_a_row_a_sample, synchronise
from clipcluster.model.task import Task
from clipcluster.recipe.plan import Plan, accumulation_of, memory_advice, plan
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.recipe.units import AUTO, Time
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.files import read_json
from clipcluster.runs.folder import Run
from clipcluster.runs.interruptions import interruptions
from clipcluster.runs.timing import seconds_of_a_save
from clipcluster.runtime.outcome import NonFiniteError
from clipcluster.runtime.stop import Stop
from clipcluster.runtime.world import World
from clipcluster.train.backward import Backward, Cached, Independent, Whole
from clipcluster.train.checkpoint import CheckpointFolder
from clipcluster.train.checkpoint_writer import versions
from clipcluster.train.compiling import compile_towers
from clipcluster.train.deadline import Deadline
from clipcluster.train.ema import Ema
from clipcluster.train.evaluations import Evaluations
from clipcluster.train.metrics import Metrics
from clipcluster.train.precision import Precision
from clipcluster.train.progress import Feed, Progress
from clipcluster.train.records import Records
from clipcluster.train.save_interval import SaveInterval
from clipcluster.train.saver import Saver
from clipcluster.train.stages import Stages
from clipcluster.train.statistics import RunningStatistics
from clipcluster.train.step import Guard, Step
from clipcluster.train.trainer import Trainer
from clipcluster.train.wrapping import WrappedTask

_SECRETS: Mapping[str, Any] = {"on_event": True, "cluster": {"environment": True}}
"""Keys that often hold tokens, and that no checkpoint has: it may be copied out of its run."""
TRIED_SAMPLES = 2  # of each micro-batch; a batch norm in training needs more than one


def build_trainer(
    run: Run,
    attempt: Attempt,
    world: World,
    stop: Stop,
    recipe: Recipe,
    sources: Sources,
    *,
    evaluated_by_job: bool = False,
) -> Trainer:
    """The trainer of a run; every rank builds the same.

    `evaluated_by_job`: evaluations are left to separate jobs, which the caller knows to be started.
    """
    plan_ = plan(recipe, sources.sampler.samples, world.size)
    attempt.phase(world.rank, "model")
    model, weights, resumes = build_start(recipe, sources.tokenizer, run, attempt, world)
    world.while_main(lambda: describe_plan(plan_))
    step = build_step(recipe, plan_, model, world, run.assets)
    if not resumes:
        check_loaded(model, step.stages.stages[0])
    frozen = step.backward.task.task.frozen
    weights |= world.while_main(lambda: {name: hash_of(file) for name, file in frozen.items()})
    constants = {"index": sources.index(), "starting_weights": weights, "plan": asdict(plan_)}
    records = Records(attempt, world, samples=sources.samples, limit=recipe.data.bad_samples.limit)
    metrics = Metrics(
        attempt, world, every=plan_.log_every, total_steps=plan_.total_steps, log_to=recipe.train.log_to
    )

    def opened(at: Progress) -> Loader:
        return open_batches(recipe, sources, world, at.batches_drawn, at.skipped)

    return Trainer(
        world=world,
        attempt=attempt,
        stop=stop,
        resumes=resumes,
        progress=Progress(steps_per_epoch=plan_.steps_per_epoch, batch_size=plan_.batch_size),
        total_steps=plan_.total_steps,
        step=step,
        feed=Feed(opened, world.device, metrics.work),
        parts=_parts_of(model, step),
        saver=build_saver(run, recipe, plan_, records, constants, evaluated=evaluated_by_job),
        evaluations=Evaluations(
            build_suite(recipe, world=world, tokenizer=sources.tokenizer),
            model,
            every=plan_.evaluate_every,
            total_steps=plan_.total_steps,
            precision=step.backward.precision,
            ema=step.ema,
            by_job=evaluated_by_job,
        ),
        metrics=metrics,
        records=records,
        record_samples=recipe.train.record_samples,
        deadline=Deadline.of_environment(recipe.cluster.grace.seconds if recipe.cluster.grace else None),
        memory_advice=memory_advice(recipe, world.size),
    )


def _parts_of(model: Any, step: Step) -> dict[str, Any]:
    """What a checkpoint holds, by name."""
    parts: dict[str, Any] = {"model": model, "optimizer": step.optimizer}
    parts |= {"scaler": step.backward.precision, "guard": step.guard}
    return parts | ({"ema": step.ema} if step.ema else {})


def build_saver(
    run: Run, recipe: Recipe, plan_: Plan, records: Records, constants: Mapping[str, Any], *, evaluated: bool
) -> Saver:
    """What writes and rotates a run's checkpoints; `evaluated`: of every step that is to be evaluated."""
    attempt, every = records.attempt, recipe.checkpoint.every
    chooses = every == AUTO and records.world.is_main
    about = {
        "versions": versions(),
        "commit": _commit(run, attempt),
        "world_size": records.world.size,
        "recipe": redacted_within(recipe.model_dump(mode="json", exclude=_SECRETS)),
    }
    return Saver(
        CheckpointFolder(attempt, about),
        records,
        keep=recipe.checkpoint.keep,
        keep_every=plan_.keep_every,
        constants=constants,
        every_steps=plan_.checkpoint_every,
        every_seconds=every.seconds if isinstance(every, Time) else None,
        every=SaveInterval(interruptions(run, attempt.number)) if chooses else None,
        evaluated=evaluated,
        last_seconds=seconds_of_a_save(run),
    )


def build_step(recipe: Recipe, plan_: Plan, model: Any, world: World, assets: Path | None) -> Step:
    """The optimizer step of a recipe; the model moves to the world's device."""
    task, precision = ready_task(recipe, model, world, assets)
    return assemble_step(recipe, plan_, model, task, precision, world)


def ready_task(recipe: Recipe, model: Any, world: World, assets: Path | None) -> tuple[Task, Precision]:
    """The task around a model on the world's device, and the recipe's precision, both ready for training."""
    precision = Precision(recipe.train.precision, world.device)
    prepare_towers(recipe, model)
    if recipe.train.sync_batch_norm:
        synchronise(model, world)
    precision.prepare(model)
    task = build_task(recipe, model, world, assets).to(world.device)
    if recipe.train.channels_last:
        model.to(memory_format=torch.channels_last)  # the first convolution converts the images to it
    if recipe.train.compile:
        compile_towers(model, world.device)
    return task, precision


def assemble_step(
    recipe: Recipe, plan_: Plan, model: Any, task: Task, precision: Precision, world: World
) -> Step:
    """The optimizer step around a task that is ready."""
    wrapped = WrappedTask(task, world)
    optimizer = build_optimizer(recipe, model, plan_.total_steps)
    slot = world.rank * plan_.per_rank_batch
    backward = build_backward(recipe, wrapped, precision, world, slot=slot, micro_batches=plan_.accumulation)
    return Step(
        backward,
        Stages(model, wrapped, optimizer, build_stages(model, plan_.freezings)),
        optimizer,
        build_schedule(recipe, plan_),
        Guard(world.device, recipe.train.non_finite.limit),
        build_ema(recipe, model),
        clip_norm=recipe.optim.clip_norm,
        clip_value=recipe.optim.clip_value,
    )


def prepare_towers(recipe: Recipe, model: Any) -> None:
    """Apply `train.batch_norm_group` and `train.activation_checkpointing` to a model.

    Raises UserError for a tower that cannot.
    """
    if recipe.train.batch_norm_group:
        size = recipe.data.image.size
        require_a_row_a_sample(model.image, torch.zeros(2, 3, size, size))
        group_batch_norms(model, recipe.train.batch_norm_group)
    if recipe.train.activation_checkpointing:
        checkpoint_activations(model)


def build_backward(
    recipe: Recipe, task: WrappedTask, precision: Precision, world: World, *, slot: int, micro_batches: int
) -> Backward:
    """The backward strategy of a recipe, for the rank whose part of each batch begins at slot `slot`."""
    accumulating = Cached if TASKS[recipe.task].loss_over == "batch" else Independent
    return (Whole if micro_batches == 1 else accumulating)(
        task,
        precision,
        RunningStatistics(task.task, world),
        seed=recipe.seed,
        slot=slot,
        micro_batches=micro_batches,
    )


def build_ema(recipe: Recipe, model: Any) -> Ema | None:
    """The moving average of a model that is on its device, or None where the recipe has none."""
    wanted = recipe.train.ema
    if wanted is None:
        return None
    device = torch.device("cpu") if wanted.device == "cpu" else None
    return Ema(model, wanted.decay, warmup=wanted.warmup, device=device)


def try_task(recipe: Recipe, assets: Path | None, world_size: int = 1) -> list[str]:
    """One forward and backward pass of the recipe's task on a few of its samples, on the CPU in float32.

    Where the run on `world_size` ranks accumulates, the samples come in two micro-batches. It finds what only
    running finds: shapes that do not fit, inputs that a tower does not take. Starting weights are not read.
    Returns the names of the parameters without a gradient, which several ranks cannot train.

    Raises UserError and DataError as building and reading do (`try_optimizer` among it), NonFiniteError, and
    whatever the towers raise.
    """
    world = World(0, 1, 0, torch.device("cpu"))
    parts = min(2, accumulation_of(recipe, world_size))
    samples = min(TRIED_SAMPLES, recipe.data.batch_size // parts) * parts
    data = recipe.data.model_copy(update={"batch_size": samples, "workers": 0})
    small = recipe.model_copy(update={"data": data})
    sources = open_sources(small, assets)
    model = build_model(small, sources.tokenizer, assets, starting_weights=False)
    prepare_towers(small, model)
    task = build_task(small, model, world, assets)
    try_optimizer(recipe, model)
    precision = Precision("fp32", world.device)
    backward = build_backward(small, WrappedTask(task, world), precision, world, slot=0, micro_batches=parts)
    batches = open_batches(small, sources, world, 0, ())
    try:
        backward.statistics.begin()
        report = backward(next(iter(batches)), 0)
    finally:
        batches.close()
    if not torch.isfinite(report.loss):
        raise NonFiniteError(
            f"The loss of {samples} samples with untrained weights is {float(report.loss)}.",
            "Check data.image.mean and std, and model.logit_scale.",
        )
    task.after_step()
    return [name for name, value in task.named_parameters() if value.requires_grad and value.grad is None]


def _commit(run: Run, attempt: Attempt) -> str | None:
    """The commit of the code that this attempt runs, from its snapshot; None where there is none."""
    try:
        facts = read_json(run.path / str(attempt.settings().get("code")) / "snapshot.json")
    except (OSError, ValueError):
        return None
    return f"{facts.get('commit')}{' and changes' if facts.get('dirty') else ''}"
