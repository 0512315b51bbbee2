"""Finding the checkpoint to resume from, and refusing one that belongs to other data or weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipcluster.runs.checkpoints import STATE, Parts
from clipcluster.runs.files import read_json
from clipcluster.runtime.outcome import DataError, RecipeFailure
from clipcluster.runtime.world import World
from clipcluster.train.checkpoint import CheckpointFolder
from clipcluster.train.checkpoint_reader import load_parts
from clipcluster.train.progress import Progress
from clipcluster.train.rollback import Range, before


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

    def look() -> dict[str, Any] | None:
        newest = folder.newest(before(skipped))
        if newest is None:
            return None
        state = read_json(newest / STATE)
        check_same(state, constants, newest)
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


def check_same(state: Mapping[str, Any], constants: Mapping[str, Any], folder: Path) -> None:
    """Raises DataError or RecipeFailure where a checkpoint was made from other shards or starting weights.

    `index` is a list of sources, each with `name` and `fingerprint`, and `shards` (name -> hash) where they
    are few; `starting_weights` maps a tower to the SHA-256 of its file.
    """
    before, now = state.get("index", []), constants.get("index", [])
    if _fingerprints(before) != _fingerprints(now):
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


def _fingerprints(index: list[Mapping[str, Any]]) -> list[Any]:
    return [source["fingerprint"] for source in index]


def _difference(before: list[Mapping[str, Any]], now: list[Mapping[str, Any]]) -> str:
    """What differs, as precisely as the checkpoint can tell."""
    if len(before) != len(now):
        return f"there were {len(before)} sources, now there are {len(now)}"
    for old, new in zip(before, now, strict=True):
        if old["fingerprint"] == new["fingerprint"]:
            continue
        shards, others = old.get("shards") or {}, new.get("shards") or {}
        for name in sorted({*shards, *others}):
            if name not in others:
                return f"shard {name} of {new['name']} is missing"
            if name not in shards:
                return f"shard {name} of {new['name']} is new"
            if shards[name] != others[name]:
                return f"shard {name} of {new['name']} has changed"
        return f"source {new['name']} has changed"
    return "their order differs"
