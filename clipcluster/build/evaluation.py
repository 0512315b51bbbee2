"""What measures a checkpoint outside of its training, as the training itself would have."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from clipcluster.build.model import build_model
from clipcluster.build.training import build_ema
from clipcluster.data.tokenizer import load_tokenizer
from clipcluster.evals.suite import build_suite
from clipcluster.model.weight_files import without_projections
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.runs.checkpoints import AVERAGE, MODEL, STATE, tensors_file
from clipcluster.runs.files import read_json
from clipcluster.runs.folder import Run
from clipcluster.runtime.outcome import CheckpointError
from clipcluster.runtime.world import World
from clipcluster.train.checkpoint import Broken, verify
from clipcluster.train.evaluations import Evaluations
from clipcluster.train.precision import Precision
from clipcluster.train.progress import Progress


def build_evaluations(
    run: Run, recipe: Recipe, checkpoint: Path, world: World
) -> tuple[Evaluations, Progress]:
    """The recipe's evaluations of a checkpoint's weights, raw and averaged, and how far it was trained.

    Every rank calls it. Raises CheckpointError, on all ranks together, where the checkpoint does not verify.
    """
    world.while_main(lambda: _verify(checkpoint))
    state = read_json(checkpoint / STATE)
    tokenizer = load_tokenizer(recipe.data.text, run.assets) if TASKS[recipe.task].captions else None
    model = build_model(recipe, tokenizer, run.assets, starting_weights=False)
    precision = Precision(recipe.train.precision, world.device)
    precision.prepare(model)
    model.load_state_dict(without_projections(load_file(checkpoint / tensors_file(MODEL))))
    model.to(world.device)
    if recipe.train.channels_last:
        model.to(memory_format=torch.channels_last)
    ema = build_ema(recipe, model)
    if ema:
        ema.load_state_dict(without_projections(load_file(checkpoint / tensors_file(AVERAGE))))
    progress = Progress(steps_per_epoch=state["plan"]["steps_per_epoch"], batch_size=recipe.data.batch_size)
    progress.load_state_dict(state)
    suite = build_suite(recipe, world=world, tokenizer=tokenizer)
    total = state["plan"]["total_steps"]
    return Evaluations(suite, model, None, total, precision, ema), progress


def _verify(checkpoint: Path) -> None:
    try:
        verify(checkpoint)
    except Broken as error:
        raise CheckpointError(
            f"{checkpoint} cannot be evaluated: {error}",
            "Train on: the next evaluation has another checkpoint.",
        ) from error
