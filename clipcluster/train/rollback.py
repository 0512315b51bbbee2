"""Going back, once in a run, to the checkpoint before a row of non-finite steps; a file remembers it.

`attempts/N/roll_back.json` is durable before the run continues: a resume skips the same batches, takes no
checkpoint that was saved within the row, and does not go back a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipcluster.runs.attempts import Attempt
from clipcluster.runs.checkpoints import name_of
from clipcluster.runs.files import read_json, write_json
from clipcluster.runs.folder import Run
from clipcluster.runtime.outcome import CheckpointError, NonFiniteError
from clipcluster.runtime.world import World
from clipcluster.train.checkpoint import CheckpointFolder
from clipcluster.train.progress import Progress
from clipcluster.train.step import Streak

FILE = "roll_back.json"
Range = tuple[int, int]
"""Batches [first, past the last)."""


def describe(streak: Streak) -> str:
    """What happened, for people."""
    return (
        f"{streak.length} steps in a row had a loss or gradient that is not finite "
        f"(batches {streak.first_batch} to {streak.last_batch})"
    )


def impossible(streak: Streak, why: str) -> NonFiniteError:
    """The failure that ends a run where it cannot go back."""
    return NonFiniteError(
        f"{describe(streak)}, {why}.",
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
        write_json(attempt.path / FILE, {**content, "reason": reason})
        set_aside_later(folder, progress)
    except OSError as error:
        raise CheckpointError(
            f"The roll-back to {checkpoint} cannot be recorded in {attempt.path / FILE}: {error}",
            "Free space on the disk of the run folder, or repair it, and submit again.",
        ) from error


def recorded(world: World, run: Run) -> list[Range]:
    """The batches that the roll-backs of all attempts skip, as rank 0 reads them. Collective.

    Raises CheckpointError for a damaged record.
    """
    found = world.while_main(
        lambda: [pair for attempt in run.attempts() for pair in _skipped_by(attempt.path / FILE)]
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


def before(skipped: Iterable[Range]) -> Callable[[Mapping[str, Any]], bool]:
    """Whether the state of a checkpoint was saved before these batches, or skips them itself."""
    ranges = list(skipped)

    def usable(state: Mapping[str, Any]) -> bool:
        known = {tuple(pair) for pair in state["skipped"]}
        return all(pair in known or state["batches_drawn"] <= pair[0] for pair in ranges)

    return usable


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
