"""The model of a recipe, at its start or with a checkpoint's weights, and the task around it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from safetensors.torch import load_file

from clipcluster.data.tokenizer import Tokenizer
from clipcluster.errors import UserError
from clipcluster.model.hugging_face import config_of, pretrained
from clipcluster.model.task import Task
from clipcluster.model.weight_files import (
    WeightsFrom,
    naming_deleted,
    shard_names,
    weights_at,
    without_projections,
)
from clipcluster.recipe.plan import Plan
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.checkpoints import MANIFEST, STATE, name_of, steps_in, weights_file
from clipcluster.runs.files import file_sha256, write_json
from clipcluster.runs.folder import Run
from clipcluster.runtime.outcome import CheckpointError
from clipcluster.runtime.world import World
from clipcluster.train.checkpoint import Broken, read_state, reading, verify

logger = logging.getLogger("clipcluster")


def build_model(
    recipe: Recipe, tokenizer: Tokenizer | None, assets: Path | None, *, starting_weights: bool = True
) -> Any:
    """The model of the recipe's task with its starting weights, in float32 on the CPU.

    Random weights are a function of the seed. `starting_weights=False` reads no weight file: for a model that
    is about to load a checkpoint.
    """
    torch.manual_seed(recipe.seed)
    return resolve_name(TASKS[recipe.task].model)(recipe, tokenizer, assets, starting_weights)


def build_start(
    recipe: Recipe, tokenizer: Tokenizer | None, run: Run, attempt: Attempt, world: World
) -> tuple[Any, dict[str, str], bool]:
    """The model that a run starts with, or one that waits for a checkpoint where the run has any.

    Returns it, the starting weights' hashes by tower, and whether it waits. Collective.
    """
    resumes = world.while_main(lambda: bool(steps_in(run.checkpoints)))
    model = build_model(recipe, tokenizer, run.assets, starting_weights=not resumes)
    weights = world.while_main(
        lambda: hashes_at_resume(recipe, run) if resumes else describe_start(model, attempt)
    )
    return model, weights, resumes


def build_task(recipe: Recipe, model: Any, ranks: World, assets: Path | None) -> Task:
    """The recipe's task, which turns batches into a loss, around its model."""
    task: Task = resolve_name(TASKS[recipe.task].builder)(recipe, model, ranks, assets)
    return task


def describe_plan(plan_: Plan) -> None:
    """Log what a run does in all, and what the plan warns of."""
    logger.info(
        "%s ranks x %s samples; %s steps, %s an epoch",
        plan_.world_size,
        f"{plan_.per_rank_batch:,}",
        f"{plan_.total_steps:,}",
        f"{plan_.steps_per_epoch:,}",
    )
    for warning in plan_.warnings:
        logger.warning("%s", warning)


def describe_start(model: Any, attempt: Attempt) -> dict[str, str]:
    """Log what a run starts from, and write `weights.json` of the attempt (rank 0 calls it).

    Returns the starting weights' hashes by tower. Raises StaleAttempt.
    """
    for coverage in model.starting_weights:
        logger.info("%s", coverage)
    hashes = {coverage.tower: hash_of(Path(coverage.file)) for coverage in model.starting_weights}
    report = [{**asdict(c), "sha256": hashes[c.tower]} for c in model.starting_weights]
    attempt.check()
    write_json(attempt.path / "weights.json", {"attempt": attempt.number, "towers": report})
    return hashes


def hashes_at_resume(recipe: Recipe, run: Run) -> dict[str, str]:
    """The hashes of the files that a run started from, as they are now: other weights are refused then.

    No tensor is read: the checkpoint has all that they brought. So a file that is gone is only logged, and
    counts as it was. Raises UserError and OSError for a file that the newest checkpoint knows nothing of.
    """
    recorded = _recorded(run)
    found: dict[str, str] = {}
    for tower, section in _started(recipe).items():
        try:
            file = _file_of(tower, section, recipe, run.assets)
            index = bool(shard_names(file))  # was once hashed itself, without the files that it names
            same = index and file_sha256(file) == recorded.get(tower)
            found[tower] = recorded[tower] if same else hash_of(file)
        except (UserError, OSError) as error:
            if tower not in recorded:
                raise
            logger.warning("the starting weights of %s cannot be compared any more: %s", tower, error)
            found[tower] = recorded[tower]
    return found


def _recorded(run: Run) -> dict[str, str]:
    """The starting weights' hashes in the newest checkpoint whose state can be read."""
    for step in reversed(steps_in(run.checkpoints)):
        with suppress(OSError, ValueError):
            return dict(read_state(run.checkpoints / name_of(step)).get("starting_weights", {}))
    return {}


def _started(recipe: Recipe) -> dict[str, Any]:
    """The sections of the recipe that name weights, by the tower that these are for."""
    config = recipe.model
    whole = config.dual if config.dual and config.dual.weights else config
    sections: dict[str, Any] = {"image": config.image, "text": config.text, "model": whole}
    return {tower: section for tower, section in sections.items() if section and section.weights}


def _file_of(tower: str, section: Any, recipe: Recipe, assets: Path | None) -> Path:
    """What a tower's `Coverage` calls its file."""
    source = Path(section.weights)
    if section.weights == "pretrained":
        key = "model.dual" if tower == "model" else f"model.{tower}"
        source = pretrained(key, section.hf, config_of(key, section.hf, assets)[1])
    return weights_at(source, recipe.model.weights_from)


def hash_of(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file, or of names and hashes of the weight files of a folder or index.

    Raises OSError, and UserError where a run deleted the checkpoint.
    """
    shards = [path.parent / name for name in shard_names(path)]
    if path.is_dir() or shards:
        files = shards or sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin"))
        return hashlib.sha256(
            "".join(f"{file.name} {hash_of(file)}\n" for file in files).encode()
        ).hexdigest()
    with naming_deleted(path):
        return file_sha256(path)


def load_checkpoint(
    model: Any, newest_first: Sequence[Path], weights: WeightsFrom | None = None
) -> tuple[Path, int, bool]:
    """Give a model the weights of the first of these checkpoints that verifies.

    weights: the moving average or the weights themselves; default the average where there is one. Returns the
    checkpoint, its step, and whether the weights are averaged; logs those that were passed over. Raises
    UserError where none of them has these weights whole, and where they are of another model or version.
    """
    reasons = []
    for path in newest_first:
        file, averaged = weights_file(path, weights)
        try:
            with reading(path):
                step = int(verify(path, [STATE, file.name])["step"])
                model.load_state_dict(without_projections(load_file(file)))
        except (Broken, FileNotFoundError) as error:
            reasons.append(f"{path.name}: {error}")
            continue
        except CheckpointError as error:  # of a newer version
            raise UserError(f"{error} {error.advice}") from error
        except RuntimeError as error:
            raise UserError(f"The weights of {path} do not fit the recipe: {error}") from error
        for reason in reasons:
            logger.warning("passed over for %s: %s", path.name, reason)
        return path, step, averaged
    what = {"ema": "averaged weights", "raw": "raw weights", None: "weights"}[weights]
    hint = " Averaged weights are kept by train.ema." if weights == "ema" else ""
    if any(f"{MANIFEST} is missing" in reason for reason in reasons):
        hint += f" One without {MANIFEST} may still be being written: try again after the run's next save."
    where = newest_first[0].parent
    raise UserError(f"No checkpoint in {where} has {what} that verify ({'; '.join(reasons)}).{hint}")
