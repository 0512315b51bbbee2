"""Where a run continues: the newest checkpoint that fits it, or the one before a row of non-finite steps.

It goes back so once in a run. `attempts/N/roll_back.json` is durable before the run continues: a resume skips
the same batches, takes no checkpoint that was saved within the row, and does not go back a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipcluster.runs.attempts import Attempt
from clipcluster.runs.checkpoints import STATE, Parts, name_of
from clipcluster.runs.files import read_json, write_json
from clipcluster.runs.folder import Run
from clipcluster.runtime.outcome import CheckpointError, DataError, NonFiniteError, RecipeFailure
from clipcluster.runtime.world import World
from clipcluster.train.checkpoint import CheckpointFolder, load_parts
from clipcluster.train.progress import Progress
from clipcluster.train.step import Streak

ROLL_BACK = "roll_back.json"
Range = tuple[int, int]
"""Batches [first, past the last)."""


def restore(
    world: World,
    folder: CheckpointFolder,
    progress: Progress,
    parts: Parts,
    constants: Mapping[str, Any],
    enter: Callable[[int], object],
    skipped: Sequence[Range] = (),
) -> Path | None:
    """Load the newest checkpoint into `progress` and `parts` on every rank; None where there is none.

    `enter(step)` comes before the loading and puts the stage of that step in force (0 without a checkpoint).
    Rank 0 looks, verifies and tells the others; all load what it found. A checkpoint that was saved within
    the batches `skipped` is passed over; the progress skips them from then on, with a checkpoint or without.
    Raises, on all ranks together, CheckpointError where none verifies, DataError for another index,
    RecipeFailure for other starting weights.
    """

    def usable(state: Mapping[str, Any]) -> bool:
        known = {tuple(pair) for pair in state["skipped"]}
        return all(pair in known or state["batches_drawn"] <= pair[0] for pair in skipped)

    def look() -> dict[str, Any] | None:
        newest = folder.newest(usable)
        if newest is None:
            return None
        state = read_json(newest / STATE)
        _check_same(state, constants, newest)
        return {"name": newest.name, "state": state, "evaluated": bool(folder.evaluation(state["step"]))}

    # One look for all ranks: two could differ where a file comes late over the network.
    newest = world.while_main(look)
    found = folder.folder / newest["name"] if newest else None
    enter(newest["state"]["step"] if newest else 0)
    if found:
        load_parts(found, newest["state"], parts, rank=world.rank, ranks=world.size)
        progress.load_state_dict(newest["state"])
        if newest["evaluated"]:
            progress.evaluated_step = progress.step
    progress.skipped = sorted({*progress.skipped, *skipped})
    return found


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
    """What differs, as precisely as the checkpoint can tell."""
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


def impossible(streak: Streak, why: str) -> NonFiniteError:
    """The failure that ends a run where it cannot go back."""
    return NonFiniteError(
        f"{streak}, {why}.",
        "Lower optim.lr, lengthen optim.warmup, set optim.clip_norm, or use train.precision bf16 or fp32.",
    )


def record(
    attempt: Attempt, folder: CheckpointFolder, progress: Progress, checkpoint: str, reason: str
) -> None:
    """Record durably the batches that `progress` skips from now on, then set later checkpoints aside.

    Raises StaleAttempt, and CheckpointError where either cannot be done.
    """
    attempt.check()
    content = {"attempt": attempt.number, "skipped": progress.skipped, "checkpoint": checkpoint}
    try:
        write_json(attempt.path / ROLL_BACK, {**content, "reason": reason})
        set_aside_later(folder, progress)
    except OSError as error:
        raise CheckpointError(
            f"The roll-back to {checkpoint} cannot be recorded in {attempt.path / ROLL_BACK}: {error}",
            "Free space on the disk of the run folder, or repair it, and submit again.",
        ) from error


def recorded(world: World, run: Run) -> list[Range]:
    """The batches that the roll-backs of all attempts skip, as rank 0 reads them. Collective.

    Raises CheckpointError for a damaged record.
    """
    found = world.while_main(
        lambda: [pair for attempt in run.attempts() for pair in _skipped_by(attempt.path / ROLL_BACK)]
    )
    return [(first, past) for first, past in found]


def _skipped_by(path: Path) -> list[Range]:
    try:
        return [(int(first), int(past)) for first, past in read_json(path)["skipped"]]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}",
            'It names the batches that the run skips, as {"skipped": [[first, past the last]]}. '
            f"Write it again from the event roll_back in {path.parent / 'events-rank-0.jsonl'}.",
        ) from error


def set_aside_later(folder: CheckpointFolder, progress: Progress) -> None:
    """Move the checkpoints after the step of `progress` away: they were saved within a row that it skips.

    Raises StaleAttempt and OSError.
    """
    for step in folder.steps():
        if step > progress.step:
            row = _named(progress.skipped)
            folder.set_aside(step, f"the run went back to step {progress.step} and skips {row}")


def refuse_to_start_anew(folder: CheckpointFolder, skipped: Sequence[Range]) -> None:
    """Raise CheckpointError where checkpoints exist, all of them saved within `skipped`."""
    steps = folder.steps()
    if steps:
        raise CheckpointError(
            f"The checkpoints in {folder.folder} ({', '.join(map(name_of, steps))}) were all saved within "
            f"{_named(skipped)}, which the run skips because their loss or gradient was not finite.",
            "Restore an older checkpoint, or, to begin from the first step without these batches, move the "
            f"folder {folder.folder} away.",
        )


def _named(ranges: Iterable[Range]) -> str:
    return " and ".join(f"batches {first} to {past - 1}" for first, past in ranges)
