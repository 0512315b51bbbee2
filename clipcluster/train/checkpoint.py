"""The checkpoints of a run on disk: which there are, the newest that verifies, broken ones set aside.

`clipcluster.runs.checkpoints` has the layout. A folder is written under another name, every file fsynced,
renamed into place, and the parent fsynced: a checkpoint exists completely or not at all.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clipcluster.runs.checkpoints import EVALUATION, name_of, steps_in
from clipcluster.runs.files import fsync_folder, read_json, write_json
from clipcluster.runtime.outcome import CheckpointError
from clipcluster.train.checkpoint_reader import Broken, verify
from clipcluster.train.checkpoint_writer import Contents, Tell, write_complete, write_own_files

WRITING, DELETING, BROKEN, PINNED = ".writing-", ".deleting-", "broken-", "pinned-"
PIN_SECONDS = 3600.0
"""A pin older than this was left by a reader that died."""
logger = logging.getLogger("clipcluster")


class CheckpointFolder:
    """The checkpoints of one run. Every rename and deletion first calls `check`, which raises when stale.

    Args:
        folder: `checkpoints` of the run; made if absent.
        check: the attempt's question whether it still owns the run.
        about: goes into every manifest: versions, commit, world size.
        attempt: the number of the attempt; no two write into the same folder.
    """

    def __init__(
        self, folder: Path, *, check: Callable[[], None], about: Mapping[str, Any], attempt: int = 0
    ) -> None:
        self.folder, self._check, self._about, self._attempt = folder, check, about, attempt

    def prepare(self) -> None:
        """Make the folder and remove what killed processes left behind. Only the run's owner may call it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.iterdir():
            if leftover.name.startswith((WRITING, DELETING)):
                self._check()
                shutil.rmtree(leftover, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps that have a folder, ascending, verified or not."""
        return steps_in(self.folder)

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.folder / name_of(step)

    def newest(self, usable: Callable[[Mapping[str, Any]], bool] = lambda state: True) -> Path | None:
        """The newest checkpoint that verifies and whose state.json is `usable`, or None where there is none.

        Broken ones newer than it are set aside with the reason. Where all are broken they stay where they are
        and CheckpointError says what to do: a run never starts from scratch over checkpoints.
        """
        broken: dict[int, str] = {}
        any_complete = False
        for step in reversed(self.steps()):
            try:
                state = verify(self.path(step))
            except Broken as error:
                broken[step] = str(error)
                logger.warning("%s does not verify: %s", self.path(step), error)
                continue
            any_complete = True
            if usable(state):
                for other, reason in broken.items():
                    self.set_aside(other, reason)
                return self.path(step)
        earlier = [path.name for path in self.folder.iterdir() if path.name.startswith(BROKEN)]
        if not any_complete and (broken or earlier):
            self._refuse(broken, earlier)
        return None

    def _refuse(self, broken: Mapping[int, str], earlier: Iterable[str]) -> None:
        reasons = [f"{name_of(step)}: {reason}" for step, reason in broken.items()]
        reasons += [f"{name}: set aside before" for name in sorted(earlier)]
        raise CheckpointError(
            f"No checkpoint in {self.folder} verifies ({'; '.join(reasons)}).",
            "Restore an intact copy of one of them, or, to begin from the first step, move the folder "
            f"{self.folder} away.",
        )

    def set_aside(self, step: int, reason: str) -> Path:
        """Rename a checkpoint to `broken-…`, with the reason beside it, and return the new path."""
        source, number = self.path(step), 1
        while (target := self.folder / f"{BROKEN}{source.name}-{number}").exists():
            number += 1
        self._check()
        os.rename(source, target)
        fsync_folder(self.folder)
        write_json(target / "why.json", {"reason": reason, "time": time.time()})
        logger.warning("%s set aside as %s: %s", source.name, target.name, reason)
        return target

    def write(self, contents: Contents, tell: Tell = lambda size: None) -> Path:
        """Write a checkpoint durably and return its folder; one that exists already and verifies stays.

        On rank 0. On another rank: write its files for rank 0 to complete. Raises OSError (nothing is left
        behind), what `tell` raises, StaleAttempt.
        """
        final = self.path(contents.step)
        aside = self.folder / f"{WRITING}{final.name}-{self._attempt}-{contents.number}"
        if contents.rank:
            self._check()
            aside.mkdir(exist_ok=True)
            write_own_files(aside, contents, tell)
            return final
        try:
            if not self._keeps(final):
                self._check()
                aside.mkdir(exist_ok=True)
                write_complete(aside, contents, self._about, tell)
                self._check()
                os.rename(aside, final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        fsync_folder(self.folder)
        return final

    def _keeps(self, final: Path) -> bool:
        if not final.exists():
            return False
        try:
            verify(final)
        except Broken as error:
            self.set_aside(int(final.name.removeprefix("step-")), str(error))
            return False
        return True

    def record_evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Put the results of an evaluation beside the checkpoint they belong to, where there is one."""
        if self.path(step).exists():
            self._check()
            write_json(self.path(step) / EVALUATION, {"step": step, "metrics": dict(results)})

    def evaluation(self, step: int) -> dict[str, float]:
        """The recorded results of a step's evaluation (null where not finite); empty where there are none."""
        try:
            return dict(read_json(self.path(step) / EVALUATION)["metrics"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def pinned(self, step: int) -> bool:
        """Whether a process is reading this checkpoint."""
        return any(time.time() - _changed(pin) < PIN_SECONDS for pin in self.path(step).glob(f"{PINNED}*"))

    def delete(self, step: int) -> None:
        """Remove a checkpoint: renamed first, so that an incomplete one never has its name."""
        source = self.path(step)
        aside = self.folder / f"{DELETING}{source.name}-{secrets.token_hex(4)}"
        self._check()
        os.rename(source, aside)
        fsync_folder(self.folder)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep the rotation of a running run from deleting this checkpoint meanwhile, where it can be pinned."""
    pin = folder / f"{PINNED}{secrets.token_hex(4)}"
    with suppress(OSError):  # another user's run, or a read-only disk: the rotation may delete it meanwhile
        pin.touch()
    try:
        yield
    finally:
        with suppress(OSError):
            pin.unlink(missing_ok=True)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
