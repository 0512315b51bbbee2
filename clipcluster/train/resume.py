"""Where a run continues: the newest checkpoint that fits it, or the one before a streak of non-finite steps.

A run is rolled back so only once. `attempts/N/roll_back.json` is durable before training continues: a later
resume skips the same batches, takes no checkpoint that was saved within the streak, and does not roll back
again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.runs.checkpoints import STATE, Parts, name_of
from clipcluster.runs.evaluations import drop_after, failed_of, owed_by
from clipcluster.runs.files import BrokenFile, read_json, write_json
from clipcluster.runs.folder import Run
from clipcluster.runs.roll_backs import FILE as ROLL_BACK
from clipcluster.runs.roll_backs import saved_within, skipped_by
from clipcluster.runtime.outcome import CheckpointError, DataError, NonFiniteError, RecipeFailure
from clipcluster.runtime.world import World
from clipcluster.train.checkpoint import CheckpointFolder, load_parts
from clipcluster.train.progress import Progress
from clipcluster.train.saver import Saver
from clipcluster.train.step import Streak

logger = logging.getLogger("clipcluster")


def restore(
    world: World, saver: Saver, progress: Progress, parts: Parts, enter: Callable[[int], object]
) -> Path | None:
    """Load the newest checkpoint into `progress` and `parts` on every rank; None where there is none.

    `enter(step)` is called before the loading and enters the stage of that step (0 without a checkpoint).
    Rank 0 chooses and verifies the checkpoint, and all ranks load it. The progress skips the batches that
    the run's roll-backs recorded, and checkpoints that were saved within them are set aside.
    Evaluations of later steps are no longer owed, because these steps are repeated; in place of earlier ones
    without a checkpoint that of the step resumed from is.
    Raises, on all ranks together, CheckpointError where no checkpoint can be used or a record is damaged,
    DataError for another index, RecipeFailure for other starting weights.
    """
    folder = saver.folder

    def look() -> dict[str, Any]:
        attempts = Run(folder.attempt.run).attempts()
        skipped = [pair for attempt in attempts for pair in _skipped(attempt.path)]
        newest = folder.newest(lambda state: saved_within(skipped, state))
        if newest is None:
            drop_after(folder.attempt, 0)
            return {"skipped": skipped, "name": None, "state": {"step": 0}}
        state = read_json(newest / STATE)
        _check_same(state, saver.constants, newest)
        drop_after(folder.attempt, state["step"])
        saver.owe_instead(state["step"])
        evaluated = _is_evaluated(folder, state)
        return {"skipped": skipped, "name": newest.name, "state": state, "evaluated": evaluated}

    # One look for all ranks: two could differ where a file comes late over the network.
    seen = world.while_main(look)
    found = folder.folder / seen["name"] if seen["name"] else None
    enter(seen["state"]["step"])
    if found:
        load_parts(found, seen["state"], parts, rank=world.rank, ranks=world.size)
        progress.load_state_dict(seen["state"])
        if seen["evaluated"]:
            progress.evaluated_step = progress.step
        elif progress.evaluated_step == progress.step:
            progress.evaluated_step = -1  # neither its results nor its mark could be written
        saver.resumed_from(progress.step)
    progress.skipped = sorted({*progress.skipped, *((first, past) for first, past in seen["skipped"])})
    return found


def _is_evaluated(folder: CheckpointFolder, state: Mapping[str, Any]) -> bool:
    """Whether the evaluation of a checkpoint is recorded, or left to a job of its own, which may have failed.

    That state.json says so is not enough: on a full disk neither the results nor the mark may be written.
    """
    run, step = Run(folder.attempt.run), state["step"]
    if state["evaluated_step"] == step:
        marked = any(owed.step == step for owed in (*owed_by(run), *failed_of(run)))
        if marked or (run.evals / f"{name_of(step)}.json").exists():
            return True
    try:
        return bool(folder.evaluation(step))
    except (OSError, UserError) as error:
        logger.warning("the results of %s cannot be read, so it is evaluated again: %s", name_of(step), error)
        return False


def _check_same(state: Mapping[str, Any], constants: Mapping[str, Any], folder: Path) -> None:
    """Raises DataError or RecipeFailure where a checkpoint was made from other shards or starting weights.

    `index` is a list of sources, each with `name` and `fingerprint`, and `shards` (name -> hash) where they
    are few; `starting_weights` maps a tower to the SHA-256 of its file.
    """
    before, now = state.get("index", []), constants.get("index", [])
    if [source["fingerprint"] for source in before] != [source["fingerprint"] for source in now]:
        raise DataError(
            f"The shards do not match those that {folder.name} was trained on: {_difference(before, now)}.",
            "Restore the shards (clipcluster shards verify names what changed), or submit the changed data "
            "as a separate run, with another name or seed.",
        )
    then, here = state.get("starting_weights", {}), constants.get("starting_weights", {})
    if then != here:
        towers = sorted(tower for tower in {*then, *here} if then.get(tower) != here.get(tower))
        raise RecipeFailure(
            f"The starting weights of {', '.join(towers)} do not match those of {folder.name}.",
            "Restore the file, or submit a separate run with the new one.",
        )


def _difference(before: list[Mapping[str, Any]], now: list[Mapping[str, Any]]) -> str:
    """What differs between two indexes, down to the shard where the checkpoint lists the shards' hashes."""
    if len(before) != len(now):
        return f"there were {len(before)} sources, now there are {len(now)}"
    pairs = zip(before, now, strict=True)
    old, new = next((old, new) for old, new in pairs if old["fingerprint"] != new["fingerprint"])
    then, here = old.get("shards") or {}, new.get("shards") or {}
    for name in sorted({*then, *here}):
        if then.get(name) != here.get(name):
            what = "is missing" if name not in here else "is new" if name not in then else "has changed"
            return f"shard {name} of {new['name']} {what}"
    return f"source {new['name']} has changed"


def record_roll_back(folder: CheckpointFolder, progress: Progress, streak: Streak) -> None:
    """Record durably that the run rolls back to before a streak of non-finite steps and skips its batches.

    Raises NonFiniteError where it was rolled back before or no checkpoint is older than the streak,
    StaleAttempt, and CheckpointError where the record cannot be written.
    """
    older = any(step <= streak.first_batch for step in folder.steps())
    if progress.skipped or not older:
        why = "although the run went back once already" if progress.skipped else "and no checkpoint is older"
        raise NonFiniteError(
            f"{streak}, {why}.",
            "Lower optim.lr, lengthen optim.warmup, set optim.clip_norm, or train in bf16 or fp32.",
        )
    attempt = folder.attempt
    attempt.check()
    skipped = [[streak.first_batch, streak.last_batch + 1]]
    try:
        content = {"attempt": attempt.number, "skipped": skipped, "reason": str(streak)}
        write_json(attempt.path / ROLL_BACK, content)
    except OSError as error:
        raise CheckpointError(
            f"The roll-back cannot be recorded in {attempt.path / ROLL_BACK}: {error}",
            "Free space on the disk of the run folder, or repair it, and submit again.",
        ) from error


def _skipped(attempt: Path) -> list[tuple[int, int]]:
    """The ranges of batches that an attempt skips; raises CheckpointError where their record is damaged."""
    try:
        return skipped_by(attempt)
    except BrokenFile as error:
        raise CheckpointError(
            f"{ROLL_BACK} is damaged: {error}",
            'It names the batches that the run skips, as {"skipped": [[first, past the last]]}. '
            f"Write it again from the event roll_back in {attempt / 'events-rank-0.jsonl'}.",
        ) from error
