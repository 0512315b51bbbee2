"""`clipcluster runs du` and `prune`: what takes space in run folders, and what may go. No torch.

Nothing is removed of a run that has a job or may have one. The newest checkpoint that verifies always stays.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.recipe.load import from_run
from clipcluster.runs.checkpoints import (
    BROKEN,
    DELETING,
    EVALUATION,
    STATE,
    WRITING,
    is_complete,
    is_pinned,
    name_of,
    step_of,
    steps_in,
    unverified,
)
from clipcluster.runs.evaluations import owed_by
from clipcluster.runs.files import fsync_folder, read_object, size_of
from clipcluster.runs.folder import Run
from clipcluster.runs.names import all_runs
from clipcluster.runs.roll_backs import saved_within, skipped_by
from clipcluster.train.rotation import kept
from jobs.state import ENDED, Queue, state_of

PARTS = ("checkpoints", "code", "attempts", "evals", "assets", "other")
_NAMED = re.compile(r"([^\s/\"':]+)/checkpoints/(step-\d{8,})")
Named = Mapping[str, Collection[int]]
"""The steps of a run's checkpoints that other runs name, by the run's name."""


@dataclass(frozen=True)
class Removable:
    """Something that no later attempt and no evaluation needs."""

    path: Path
    bytes: int
    why: str


def named_by_others(folder: Path) -> Named:
    """The checkpoints that runs in a folder name: what they start from, or learn from.

    By the run's name and the checkpoint's, wherever the folder of runs was when they were written.
    """
    found: dict[str, set[int]] = {}
    for run in all_runs(folder):
        for file in (run.recipe_file, run.settings_file):
            with contextlib.suppress(FileNotFoundError):
                for name, checkpoint in _NAMED.findall(file.read_text(errors="replace")):
                    found.setdefault(name, set()).add(step_of(checkpoint) or 0)
    return found


def used(run: Run, queue: Queue, named: Named) -> dict[str, Any]:
    """What a run takes: `parts` by `PARTS` and in all, in bytes; `removable` in bytes, by sizes alone.

    Raises UserError for a run that cannot be read.
    """
    state = state_of(run, queue)
    parts = dict.fromkeys(PARTS, 0)
    for path in run.path.iterdir():
        name = "code" if path.name.startswith("code-") else path.name
        parts[name if name in parts else "other"] += size_of(path)
    idle = _is_idle(state.name, queued=state.queued)
    return {
        "name": run.name,
        "path": str(run.path),
        "state": state.name,
        "bytes": sum(parts.values()),
        "parts": parts,
        "checkpoints": len(steps_in(run.checkpoints)),
        "removable": sum(one.bytes for one in removable(run, is_complete, named)) if idle else 0,
    }


def _is_idle(state: str, *, queued: bool) -> bool:
    """Whether no job of the run is there or may come by itself."""
    return state in ENDED and not queued


def removable(run: Run, sound: Callable[[Path], bool], named: Named) -> list[Removable]:
    """What may go of a run that has no job. `sound`: whether a checkpoint is intact.

    Nothing where there are checkpoints and none is sound. Raises UserError for a run that cannot be read.
    """
    steps = steps_in(run.checkpoints)
    skipped = [pair for attempt in run.attempts() for pair in skipped_by(attempt.path)]
    newest = next((step for step in reversed(steps) if _resumable(run, step, sound, skipped)), None)
    if newest is None and steps:
        return []
    found = []
    if newest is not None:
        for step in sorted({step for step in steps if step < newest} - _kept(run, steps, newest, named)):
            found.append(_entry(run.checkpoints / name_of(step), f"older than {name_of(newest)}"))
    for path in sorted(run.checkpoints.glob(f"{BROKEN}*")) if newest is not None else []:
        found.append(_entry(path, "set aside: it does not verify"))
    for prefix in (WRITING, DELETING):
        for path in sorted(run.checkpoints.glob(f"{prefix}*")):
            found.append(_entry(path, "left by a process that was killed"))
    return found


def _resumable(
    run: Run, step: int, sound: Callable[[Path], bool], skipped: Collection[tuple[int, int]]
) -> bool:
    """Whether a resume would take this checkpoint: it is intact, and no roll-back has undone it."""
    checkpoint = run.checkpoints / name_of(step)
    if not sound(checkpoint):
        return False
    return not skipped or not saved_within(skipped, read_object(checkpoint / STATE) or {})


def _entry(path: Path, why: str) -> Removable:
    return Removable(path, size_of(path), why)


def _kept(run: Run, steps: list[int], newest: int, named: Named) -> set[int]:
    """The steps that `checkpoint.keep` keeps for good, that are read, named or still to be evaluated."""
    keep = from_run(run.recipe(), run.settings()).checkpoint.keep
    folders = {step: run.checkpoints / name_of(step) for step in steps}
    stay = {*(one.step for one in owed_by(run)), *named.get(run.name, ())}
    pinned = [step for step, folder in folders.items() if step in stay or is_pinned(folder)]
    plan = (read_object(folders[newest] / STATE) or {}).get("plan") or {}
    values = {}
    for step, folder in folders.items() if keep.best else ():
        metrics = (read_object(folder / EVALUATION, metrics=dict) or {}).get("metrics", {})
        value = metrics.get(keep.best.metric) if keep.best else None
        if isinstance(value, (int, float)):
            values[step] = value
    only_last = keep.model_copy(update={"last": 1})
    return kept(only_last, plan.get("keep_every"), steps, values, pinned)


def prune(run: Run, queue: Queue) -> Iterator[Removable]:
    """Remove what may go, one after the other, and yield each.

    Checkpoints are read in full first: the newest whose every byte matches its manifest stays. The caller
    keeps submissions away meanwhile. Raises UserError for a run that has a job, or may have one.
    """
    state = state_of(run, queue)
    if not _is_idle(state.name, queued=state.queued):
        raise UserError(f"{run.name} is {state}: nothing of it is removed")
    named = named_by_others(run.path.parent)
    for one in removable(run, lambda checkpoint: not unverified(checkpoint), named):
        aside = one.path
        if not aside.name.startswith((WRITING, DELETING)):  # renamed first: no name holds half a checkpoint
            aside = one.path.parent / f"{DELETING}{one.path.name}-{secrets.token_hex(4)}"
            os.rename(one.path, aside)
            fsync_folder(aside.parent)
        shutil.rmtree(aside)
        yield one
