"""The checkpoints of a run on disk: the newest that verifies, broken ones set aside, reading one.

`clipcluster.runs.checkpoints` has the layout. A folder is written under another name, every file fsynced,
renamed into place, and the parent fsynced: a checkpoint exists completely or not at all.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from clipcluster.errors import UserError
from clipcluster.recipe.sections.checkpoint import Keep
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.checkpoints import (
    BROKEN,
    DELETING,
    EVALUATION,
    MANIFEST,
    PINNED,
    STATE,
    WRITING,
    Parts,
    is_per_rank,
    is_pinned,
    may_be_absent,
    name_of,
    read_manifest,
    steps_in,
    tensors_file,
    unverified,
)
from clipcluster.runs.evaluations import owed_by
from clipcluster.runs.files import fsync_folder, read_json, read_object, write_json
from clipcluster.runs.folder import Run
from clipcluster.runtime.outcome import CheckpointError
from clipcluster.train.checkpoint_writer import Contents, Tell, write_complete, write_own_files
from clipcluster.train.rotation import kept

FORMATS = (1, 2)
"""The formats that can be read. In format 1 the logit scale is 0-dimensional, and no part differs by rank."""
logger = logging.getLogger("clipcluster")


class Broken(Exception):
    """This checkpoint does not verify; the message says why."""


class CheckpointFolder:
    """The checkpoints of one run, for one attempt; before every change it checks that it is not stale.

    about: what every manifest has beside its files: versions, commit, world size, the recipe.
    """

    def __init__(self, attempt: Attempt, about: Mapping[str, Any]) -> None:
        self.folder, self.attempt, self._about = Run(attempt.run).checkpoints, attempt, about

    def prepare(self) -> None:
        """Make the folder and remove what killed processes left behind. Only the run's owner may call it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.iterdir():
            if leftover.name.startswith((WRITING, DELETING)):
                self.attempt.check()
                shutil.rmtree(leftover, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps that have a folder, ascending, verified or not."""
        return steps_in(self.folder)

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.folder / name_of(step)

    def newest(self, unusable: Callable[[Mapping[str, Any]], str] = lambda state: "") -> Path | None:
        """The newest checkpoint that verifies and can be used, or None where there is none.

        unusable: from a state.json to the reason why the checkpoint cannot be used, "" where it can. Newer
        checkpoints that were passed over are set aside with the reason. Where there are checkpoints and none
        can be used, none is moved and CheckpointError says what to do: such a run never starts from scratch.
        """
        reasons: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                reason = unusable(verify(self.path(step)))
            except Broken as error:
                reason = f"it does not verify: {error}"
            if not reason:
                for newer, why in reasons.items():
                    self.set_aside(newer, why)
                return self.path(step)
            reasons[step] = reason
        all_reasons = [f"{name_of(step)}: {reason}" for step, reason in reasons.items()]
        all_reasons += [f"{path.name}: set aside before" for path in sorted(self.folder.glob(f"{BROKEN}*"))]
        if all_reasons:
            raise CheckpointError(
                f"No checkpoint in {self.folder} can be used ({'; '.join(all_reasons)}).",
                "Restore an intact copy of one of them, or, to begin from the first step, move the folder "
                f"{self.folder} away.",
            )
        return None

    def set_aside(self, step: int, reason: str) -> None:
        """Rename a checkpoint to `broken-…`, with the reason beside it."""
        source, number = self.path(step), 1
        while (target := self.folder / f"{BROKEN}{source.name}-{number}").exists():
            number += 1
        self.attempt.check()
        os.rename(source, target)
        fsync_folder(self.folder)
        write_json(target / "why.json", {"reason": reason, "time": time.time()})
        logger.warning("%s set aside as %s: %s", source.name, target.name, reason)

    def write(self, contents: Contents, tell: Tell = lambda size: None) -> None:
        """Write a checkpoint durably; one that exists already and verifies stays.

        Rank 0 writes the checkpoint; any other rank writes its own files, which rank 0 adds. Raises OSError
        (nothing is left behind), StaleAttempt, and what `tell` raises.
        """
        final = self.path(contents.step)
        aside = self.folder / f"{WRITING}{final.name}-{self.attempt.number}-{contents.number}"
        self.attempt.check()

        def telling(size: int) -> None:
            if size == 0:  # a peer that is stale writes no receipt
                self.attempt.check()
            tell(size)

        if contents.rank:
            aside.mkdir(exist_ok=True)
            write_own_files(aside, contents, tell)
            return
        try:
            verify(final)
        except Broken as error:
            if final.exists():
                self.set_aside(contents.step, str(error))
            aside.mkdir(exist_ok=True)
            write_complete(aside, contents, self._about, telling)
            self.attempt.check()
            os.rename(aside, final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        fsync_folder(self.folder)

    def record_evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Put the results of an evaluation beside the checkpoint they belong to, where there is one."""
        if self.path(step).exists():
            self.attempt.check()
            write_json(self.path(step) / EVALUATION, {"step": step, "metrics": dict(results)})

    def evaluation(self, step: int) -> dict[str, float]:
        """The recorded results of a step's evaluation (null where not finite); empty where there are none.

        Raises OSError where they cannot be read, UserError where the file holds something else.
        """
        document = read_object(self.path(step) / EVALUATION, metrics=dict)
        return dict(document["metrics"]) if document else {}

    def pinned(self, step: int) -> bool:
        """Whether a process is reading this checkpoint, or a job of its own is still to evaluate it."""
        if any(owed.step == step for owed in owed_by(Run(self.attempt.run))):
            return True
        return is_pinned(self.path(step))

    def rotate(self, keep: Keep, every: int | None, sound: int) -> None:
        """Delete what `keep` does not keep; `every`: its `every` in steps.

        The newest of at most `sound` steps stays, because the run may go back to it; so does one whose
        results cannot be read, because it may be the best. Raises OSError where a folder cannot be listed,
        before anything is deleted.
        """
        steps = self.steps()
        # Before the results: an evaluation lets go of its checkpoint once it has recorded them.
        stay = [step for step in steps if self.pinned(step)]
        stay += [step for step in steps if step <= sound][-1:]
        values, unread = self._measured(keep.best.metric, steps) if keep.best else ({}, [])
        for step in sorted(set(steps) - kept(keep, every, steps, values, [*stay, *unread])):
            self.delete(step)

    def _measured(self, metric: str, steps: Iterable[int]) -> tuple[dict[int, float], list[int]]:
        """The metric at the steps where it is known and finite; the steps whose results cannot be read."""
        values: dict[int, float] = {}
        unread: list[int] = []
        for step in steps:
            try:
                value = self.evaluation(step).get(metric)
            except (OSError, UserError) as error:
                logger.warning("%s is kept, because its evaluation cannot be read: %s", name_of(step), error)
                unread.append(step)
            else:
                if value is not None:  # null: not finite
                    values[step] = value
        return values, unread

    def delete(self, step: int) -> None:
        """Remove a checkpoint: renamed first, so that an incomplete one never has its name."""
        source = self.path(step)
        aside = self.folder / f"{DELETING}{source.name}-{secrets.token_hex(4)}"
        self.attempt.check()
        os.rename(source, aside)
        fsync_folder(self.folder)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Inside, the rotation of a running run does not delete this checkpoint, where it can be pinned."""
    pin = folder / f"{PINNED}{secrets.token_hex(4)}"
    with suppress(OSError):  # another user's run, or a read-only disk: the rotation may delete it meanwhile
        pin.touch()
    try:
        yield
    finally:
        with suppress(OSError):
            pin.unlink(missing_ok=True)


def load_parts(
    folder: Path, state: Mapping[str, Any], parts: Parts, *, rank: int = 0, ranks: int = 1
) -> None:
    """Give every part its state from a verified checkpoint; a part that differs by rank gets its own rank's.

    A part that may be absent, and is, gets {}. Raises CheckpointError where a part and its state do not fit,
    and where parts that differ by rank were written by another number of ranks.
    """
    new = {name for name, part in parts.items() if may_be_absent(part)} - set(state["parts"])
    if set(parts) - new != set(state["parts"]):
        raise CheckpointError(
            f"{folder} holds {', '.join(state['parts'])}; this run has {', '.join(sorted(parts))}.",
            "Resume with the recipe and the code that wrote the checkpoint, or start another run.",
        )
    own = sorted(name for name, part in parts.items() if is_per_rank(part))
    per_rank, written_by = state.get("per_rank", []), state.get("ranks", 1)
    if own != per_rank or (own and written_by != ranks):
        raise CheckpointError(
            f"{folder} was written by {written_by} ranks, with parts of each rank's own: "
            f"{', '.join(per_rank) or 'none'}; this run has {ranks} ranks and {', '.join(own) or 'none'}.",
            f"Resume on {written_by} ranks, with the recipe and the code that wrote the checkpoint.",
        )
    for name, part in parts.items():
        file = folder / tensors_file(name, rank if name in own else None)
        try:
            values = dict(state.get(name, {}))
            if file.exists():
                values.update(load_file(file))
            part.load_state_dict(values)
        except (RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder}: the state of {name} does not fit: {error}",
                "Resume with the recipe and the code that wrote the checkpoint, or start another run.",
            ) from error


def verify(folder: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """Read every byte of a checkpoint and return its state.json.

    names: read only these of its files, state.json among them; None: all.
    Raises Broken with the reason; OSError where a file exists and cannot be read, since such a checkpoint may
    be intact; CheckpointError for a newer format.
    """
    try:
        if STATE not in read_manifest(folder):
            raise Broken(f"{MANIFEST} does not list {STATE}")
        reason = unverified(folder, names)
        if reason:
            raise Broken(reason)
        return read_state(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Broken(f"{Path(error.filename).name} is missing") from error
    except ValueError as error:
        raise Broken(str(error)) from error


_Count = Annotated[int, Field(ge=-1)]


class _Source(BaseModel, strict=True):
    name: str
    fingerprint: str


class _State(BaseModel, strict=True):
    """What a resume needs of state.json, besides the parts' own values."""

    step: _Count
    samples: _Count
    batches_drawn: _Count
    evaluated_step: _Count
    skipped: list[Annotated[list[_Count], Field(min_length=2, max_length=2)]]
    parts: list[str]
    per_rank: list[str] = []
    ranks: _Count = 1
    index: list[_Source] = []
    starting_weights: dict[str, str] = {}


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, not verified by its manifest.

    Raises OSError, ValueError where it is not the state of a run, and CheckpointError for a newer format.
    """
    state = read_json(folder / STATE)
    version = state.get("format") if isinstance(state, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{STATE} has no format")
    if version not in FORMATS:
        raise CheckpointError(
            f"{folder} has format {version}; this version reads {' and '.join(map(str, FORMATS))}.",
            "Resume with the version that wrote it.",
        )
    try:
        _State.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{STATE} is not the state of a run: {first['loc'][0]}: {first['msg']}") from error
    return dict(state)
