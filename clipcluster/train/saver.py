"""When checkpoints are written, by which thread, and what happens when that fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from clipcluster.recipe.sections.checkpoint import Keep
from clipcluster.runs.checkpoints import Parts, is_per_rank
from clipcluster.runtime.outcome import CheckpointError
from clipcluster.runtime.stop import Wish
from clipcluster.train.checkpoint import CheckpointFolder
from clipcluster.train.checkpoint_writer import Contents, Dropped, take_copy
from clipcluster.train.progress import Progress
from clipcluster.train.records import Records
from clipcluster.train.rotation import kept

logger = logging.getLogger("clipcluster")
ATTEMPTS = 2
"""Failed saves in a row that end the run."""


class _Write(threading.Thread):
    """One checkpoint on its way to the disk."""

    def __init__(self, folder: CheckpointFolder, contents: Contents) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.step = contents.step
        self.drop, self.peers_lost = threading.Event(), threading.Event()
        self.began = time.monotonic()
        self.seconds = 0.0
        self.error: BaseException | None = None
        self._written = 0
        self._folder, self._contents = folder, contents

    def run(self) -> None:
        try:
            self._folder.write(self._contents, self._tell)
        except BaseException as error:  # handed to the training thread by Saver.finish
            self.error = error
        self.seconds = time.monotonic() - self.began

    def _tell(self, size: int) -> None:
        self._written += size
        waiting_for_peers = size == 0
        if self.drop.is_set() or (waiting_for_peers and self.peers_lost.is_set()):
            raise Dropped

    def expected_seconds(self) -> tuple[float, float]:
        """How long this write has taken, and how long it takes in all at its pace, once that is known."""
        passed = time.monotonic() - self.began
        times = self._contents.bytes / self._written if self._written else 1.0
        return passed, passed * max(1.0, times)


def to_drop(passed: float, whole: float, seconds_left: float) -> bool:
    """Whether a write under way is given up for the one that is to follow it.

    It is where only the new one fits into the time left: both take `whole` seconds, of which the one under
    way has had `passed`. Where the new one alone does not fit either, the older has the better chance.
    """
    return whole <= seconds_left < max(0.0, whole - passed) + whole


class Saver:
    """Saves: a copy between steps, then a thread writes. Rank 0 decides, and the others do as it says.

    A rank other than 0 writes only where a part differs by rank; every rank calls the methods alike.

    Args:
        keep: the rotation policy; keep_every: its `every`, in steps.
        constants: what state.json says besides the progress: index, starting weights (a resume with others is
            refused), plan.
        every_steps, every_seconds: when to save; one of them. Steps that `keep` keeps for good, and with a
            best metric those that were evaluated, are saved besides.
        last_seconds: how long a save of this run took last, where an earlier attempt saved.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        records: Records,
        *,
        keep: Keep,
        keep_every: int | None = None,
        constants: Mapping[str, Any],
        every_steps: int | None = None,
        every_seconds: float | None = None,
        last_seconds: float = 0.0,
    ) -> None:
        self.folder, self.records, self._world = folder, records, records.world
        self._keep, self._keep_every, self.constants = keep, keep_every, constants
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._write: _Write | None = None
        self._clock = time.monotonic()
        self._asked_at = -1
        self._begun = self._sound = 0
        self._failures = 0
        self._evaluations: dict[int, Mapping[str, float]] = {}
        self.durable_step = -1
        self.last_seconds = last_seconds

    def resumed_from(self, step: int) -> None:
        """The checkpoint of `step` exists: it need not be written again."""
        self.durable_step = self._asked_at = step
        self._evaluations.clear()  # of steps that a roll-back undid

    def wishes(self, progress: Progress) -> Wish:
        """SAVE when a save is due or must be repeated; what failed for good is a failure of the records."""
        if self._write and not self._write.is_alive():
            self.finish()
        repeated = bool(self._failures) and self._write is None
        due = self._world.is_main and (repeated or self._due(progress))
        return Wish.SAVE if due else Wish.NONE

    def _due(self, progress: Progress) -> bool:
        if progress.step in (0, self._asked_at, self.durable_step):
            return False
        if progress.step == progress.evaluated_step and self._keep.best:
            return True
        if self._keep_every and progress.step % self._keep_every == 0:
            return True  # else there would be none to keep
        if self._every_steps:
            return progress.step % self._every_steps == 0
        if self._every_seconds is None or self._write:
            return False  # by the clock no save waits for the one before it
        return time.monotonic() - self._clock >= self._every_seconds

    def save(self, progress: Progress, parts: Parts, sound: int | None = None) -> None:
        """Copy the parts now and let a thread write them. Collective.

        The write before it, if there is one, is finished first; the other ranks wait, however long it takes.
        `sound`: batches before those that a roll-back may still skip (all where None): the newest checkpoint
        of no more of them stays.
        """
        if self._world.while_main(lambda: self._wanted(progress.step)):
            self._start(progress, parts)
            self._sound = progress.step if sound is None else sound

    def _wanted(self, step: int) -> bool:
        """On rank 0: whether a step is still to be written, once the write under way is done."""
        self.finish()
        return self.records.failure is None and self.durable_step != step

    def _start(self, progress: Progress, parts: Parts) -> None:
        self.finish()
        self._asked_at, self._clock = progress.step, time.monotonic()
        self._begun += 1
        if self._world.is_main or any(map(is_per_rank, parts.values())):
            state = {**progress.state_dict(), **self.constants}
            rank, ranks = self._world.rank, self._world.size
            contents = take_copy(progress.step, state, parts, rank=rank, ranks=ranks, number=self._begun)
            self._write = _Write(self.folder, contents)
            self._write.start()

    def save_and_wait(self, progress: Progress, parts: Parts, seconds_left: float | None = None) -> None:
        """Have this step durable on return, or a failure kept after the second try. Collective.

        A write under way is finished first, unless only this step's fits into `seconds_left`: then it is
        dropped. How long a save takes is known from the last one, and from the pace of the one under way.
        """
        self._world.while_main(lambda: self._finish_or_drop(progress.step, seconds_left))
        while self._world.while_main(lambda: self._wanted(progress.step)):
            self._start(progress, parts)

    def _finish_or_drop(self, step: int, seconds_left: float | None) -> None:
        write = self._write
        if write and write.step != step and seconds_left is not None:
            passed, whole = write.expected_seconds()
            if to_drop(passed, max(whole, self.last_seconds), seconds_left):
                logger.warning(
                    "%.0f s are left: step %d is saved, not step %d", seconds_left, step, write.step
                )
                write.drop.set()
        self.finish()

    def peers_lost(self) -> None:
        """A write under way no longer waits for files of the other ranks."""
        if self._write:
            self._write.peers_lost.set()

    def finish(self) -> None:
        """Wait for the write under way on this rank, if any, and take its result."""
        write, self._write = self._write, None
        if write is None:
            return
        write.join()
        error = write.error
        if isinstance(error, OSError):
            self._note_failure(write.step, error)
        elif error is None and self._world.is_main:
            self._failures, self.durable_step, self.last_seconds = 0, write.step, write.seconds
            self.records.event("checkpoint", step=write.step, seconds=round(write.seconds, 3))
            self._settle()
        elif error is not None and not isinstance(error, Dropped):
            self.records.failure = error if isinstance(error, Exception) else RuntimeError(str(error))

    def _settle(self) -> None:
        """Record what was measured of the newest checkpoint, then rotate; both can wait for the next one."""
        with self.records.keeping():
            if self.durable_step in self._evaluations:
                self.folder.record_evaluation(self.durable_step, self._evaluations.pop(self.durable_step))
            self._rotate()

    def _note_failure(self, step: int, error: OSError) -> None:
        if not self._world.is_main:
            logger.error("this rank's files of step %d could not be written: %s", step, error)
            return  # rank 0 is told by the receipt, and counts
        self._failures += 1
        logger.error("the save of step %d failed (%d of %d): %s", step, self._failures, ATTEMPTS, error)
        self.records.event("checkpoint_failed", step=step, reason=str(error))
        if self._failures >= ATTEMPTS and not self.records.failure:
            self.records.failure = CheckpointError(
                f"{self._failures} saves in a row failed, the last at step {step}: {error}",
                "Free space on the disk of the run folder, or repair it, and submit again: the run resumes "
                "from its last checkpoint; no older one was removed.",
            )

    def record_evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Keep the results of an evaluation with the checkpoint of its step, there or to come."""
        if not self._world.is_main:
            return
        self._evaluations = {step: dict(results)}
        if self._write is None and self.durable_step == step:
            self._settle()

    def _rotate(self) -> None:
        steps = self.folder.steps()
        best = self._keep.best
        found = {step: self.folder.evaluation(step).get(best.metric) for step in steps} if best else {}
        values = {step: value for step, value in found.items() if value is not None}  # null: not finite
        pinned = [step for step in steps if self.folder.pinned(step)]
        pinned += [step for step in steps if step <= self._sound][-1:]
        for step in sorted(set(steps) - kept(self._keep, self._keep_every, steps, values, pinned)):
            self.folder.delete(step)
