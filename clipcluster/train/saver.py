"""When checkpoints are written, by which thread, and what happens when that fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from clipcluster.recipe.sections.checkpoint import Keep
from clipcluster.runs.checkpoints import Parts, is_per_rank
from clipcluster.runs.evaluations import owe, owe_instead
from clipcluster.runtime.outcome import CheckpointError
from clipcluster.runtime.stop import Wish
from clipcluster.train.checkpoint import CheckpointFolder
from clipcluster.train.checkpoint_writer import Contents, Dropped, take_copy
from clipcluster.train.progress import Progress
from clipcluster.train.records import Records
from clipcluster.train.save_interval import SaveCost, SaveInterval

logger = logging.getLogger("clipcluster")
SAVING = "saving a checkpoint"
FAILED_SAVES = 2
"""The number of consecutive failed saves that ends the run."""


class _Write(threading.Thread):
    """The thread that writes one checkpoint."""

    def __init__(
        self, folder: CheckpointFolder, contents: Contents, beat: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.step = contents.step
        self.drop, self.peers_lost = threading.Event(), threading.Event()
        self.began = time.monotonic()
        self.seconds = 0.0
        self.error: BaseException | None = None
        self._written = 0
        self._folder, self._contents, self._beat = folder, contents, beat

    def run(self) -> None:
        try:
            self._folder.write(self._contents, self._tell)
        except BaseException as error:  # handed to the training thread by Saver.finish
            self.error = error
        self.seconds = time.monotonic() - self.began

    def _tell(self, size: int) -> None:
        self._written += size
        if size:
            self._beat()
        waiting_for_peers = size == 0
        if self.drop.is_set() or (waiting_for_peers and self.peers_lost.is_set()):
            raise Dropped

    def expected_seconds(self) -> tuple[float, float]:
        """Seconds that this write has taken so far, and that it takes in all at its speed so far."""
        passed = time.monotonic() - self.began
        ratio = self._contents.bytes / self._written if self._written else 1.0
        return passed, passed * max(1.0, ratio)


def to_drop(passed: float, whole: float, seconds_left: float) -> bool:
    """Whether a write under way is dropped in favour of a newer checkpoint.

    Each write takes `whole` seconds, and the one under way has run for `passed`. It is dropped where the
    newer one fits into the time left and both do not. Where not even the newer one fits, the one under way
    is more likely to complete.
    """
    return whole <= seconds_left < max(0.0, whole - passed) + whole


class Saver:
    """Saves checkpoints: a copy is taken between steps, and a thread writes it. Rank 0 decides when.

    Other ranks write only where a part differs by rank; every rank calls the methods at the same steps.

    Args:
        keep: the rotation policy; keep_every: its `every`, in steps.
        constants: what state.json holds besides the progress: index, starting weights (a resume with others
            is refused), plan.
        every_steps, every_seconds, every: the interval between saves; one of them. Steps that `keep.every`
            keeps, and with `evaluated` or `keep.best` evaluated steps, are saved too.
        last_seconds: how long the last save of this run took, where an earlier attempt saved.
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
        every: SaveInterval | None = None,
        evaluated: bool = False,
        last_seconds: float = 0.0,
    ) -> None:
        self.folder, self.records, self._world = folder, records, records.world
        self._keep, self._keep_every, self.constants = keep, keep_every, constants
        self._every_steps, self._every_seconds, self._every = every_steps, every_seconds, every
        self._cost = SaveCost(self._world.pulse)
        self._evaluated = evaluated or keep.best is not None
        self._write: _Write | None = None
        self._clock = time.monotonic()
        self._asked_at = -1
        self._begun = self._sound = 0
        self._failures = 0
        self._evaluations: dict[int, Mapping[str, float]] = {}
        self._to_owe: list[int] = []
        self.durable_step = -1
        self.last_seconds = last_seconds

    def resumed_from(self, step: int) -> None:
        """Note that the checkpoint of `step` exists, and need not be written again."""
        self.durable_step = self._asked_at = step
        self._evaluations.clear()  # of steps that a roll-back undid
        self._to_owe.clear()

    def wishes(self, progress: Progress) -> Wish:
        """SAVE where a save is due or has to be repeated; after `FAILED_SAVES`, `records.failure` is set."""
        if self._write and self._write.is_alive():
            self._cost.beside(progress.step)
        elif self._write:
            with self._cost.waiting():
                self.finish()
        repeated = bool(self._failures) and self._write is None
        due = self._world.is_main and (repeated or self._due(progress))
        return Wish.SAVE if due else Wish.NONE

    def _due(self, progress: Progress) -> bool:
        if progress.step in (0, self._asked_at, self.durable_step):
            return False
        if progress.step == progress.evaluated_step and self._evaluated:
            return True
        if self._keep_every and progress.step % self._keep_every == 0:
            return True  # rotation can only keep what was saved
        if self._every_steps:
            return progress.step % self._every_steps == 0
        seconds = self._every.seconds if self._every else self._every_seconds
        if seconds is None or self._write:
            return False  # a save that is due by the clock does not wait for the one under way
        return time.monotonic() - self._clock >= seconds

    def seconds_to_stop(self) -> float:
        """Seconds that the write under way and one more save take; 0.0 before a save was timed."""
        passed, whole = self._write.expected_seconds() if self._write else (0.0, 0.0)
        whole = max(whole, self.last_seconds) if self.last_seconds else 0.0
        return whole + (max(0.0, whole - passed) if self._write else 0.0)

    def save(self, progress: Progress, parts: Parts, sound: int | None = None) -> None:
        """Copy the parts now and let a thread write them. Collective.

        A write under way is finished first; the other ranks wait for it, however long it takes.
        sound: the number of batches before an unread streak of non-finite steps, None where there is none.
        The newest checkpoint of at most so many batches is kept for a roll-back.
        """
        self._world.pulse.begin(SAVING)
        with self._cost.waiting():
            if self._world.while_main(lambda: self._wanted(progress.step)):
                self._start(progress, parts)
                self._sound = progress.step if sound is None else sound
                self._cost.begin()

    def _wanted(self, step: int) -> bool:
        """On rank 0: whether a step still has to be written, once the write under way is done."""
        self.finish()
        return self.records.failure is None and self.durable_step != step

    def _start(self, progress: Progress, parts: Parts) -> None:
        self.finish()
        self._asked_at, self._clock = progress.step, time.monotonic()
        self._begun += 1
        if self._world.is_main or any(map(is_per_rank, parts.values())):
            state = {**progress.state_dict(), **self.constants}
            rank, ranks = self._world.rank, self._world.size
            began = time.monotonic()
            contents = take_copy(progress.step, state, parts, rank=rank, ranks=ranks, number=self._begun)
            self._write = _Write(self.folder, contents, self._beat)
            self._write.began = began  # the copy is a part of the save
            self._write.start()

    def _beat(self) -> None:
        """A write is a sign of life while this rank waits for it, not beside a training that is stuck."""
        if self._world.pulse.doing == SAVING:
            self._world.pulse.beat()

    def save_and_wait(
        self,
        progress: Progress,
        parts: Parts,
        sound: int | None = None,
        *,
        seconds_left: float | None = None,
    ) -> None:
        """Make this step durable; after `FAILED_SAVES` tries `records.failure` is set instead. Collective.

        A write under way is finished first, or dropped where only this step's fits into `seconds_left`. The
        length of a save is estimated from the last one, and from the speed of the one under way. sound: as of
        `save`.
        """
        self._world.pulse.begin(SAVING)
        self._world.while_main(lambda: self._finish_or_drop(progress.step, seconds_left))
        while self._world.while_main(lambda: self._wanted(progress.step)):
            self._start(progress, parts)
            self._sound = progress.step if sound is None else sound

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
        """Let a write under way no longer wait for files of the other ranks."""
        if self._write:
            self._write.peers_lost.set()

    def finish(self) -> None:
        """Wait for the write under way on this rank, if any, and record its result."""
        write, self._write = self._write, None
        if write is None:
            return
        if write.is_alive():
            self._world.pulse.begin(SAVING)
        write.join()
        error = write.error
        if isinstance(error, OSError):
            self._note_failure(write.step, error)
        elif error is None and self._world.is_main:
            self._failures, self.durable_step, self.last_seconds = 0, write.step, write.seconds
            self._record(write)
            self._settle()
        elif error is not None and not isinstance(error, Dropped):
            self.records.failure = error if isinstance(error, Exception) else RuntimeError(str(error))

    def _record(self, write: _Write) -> None:
        """Record a durable checkpoint, and what it cost where the training went on meanwhile."""
        cost, costs = self._cost.take(), dict[str, float]()
        if cost is not None:
            costs["cost"] = round(cost, 3)
            if self._every:
                self._every.saved(cost)
        self.records.event("checkpoint", step=write.step, seconds=round(write.seconds, 3), **costs)

    def _settle(self) -> None:
        """Record evaluations of durable steps, then rotate; what fails here is repeated at the next save.

        Nothing is rotated away while an evaluation of it could not be marked as owed, or recorded.
        """
        with self.records.keeping():
            self._owe()
            self.owe_instead(self.durable_step)
            for step in sorted(step for step in self._evaluations if step <= self.durable_step):
                self.folder.record_evaluation(step, self._evaluations[step])
                del self._evaluations[step]
            self.folder.rotate(self._keep, self._keep_every, self._sound)

    def _note_failure(self, step: int, error: OSError) -> None:
        if not self._world.is_main:
            logger.error("this rank's files of step %d could not be written: %s", step, error)
            return  # rank 0 learns of it from the receipt, and counts it
        self._failures += 1
        logger.error("the save of step %d failed (%d of %d): %s", step, self._failures, FAILED_SAVES, error)
        self.records.event("checkpoint_failed", step=step, reason=str(error))
        if self._failures >= FAILED_SAVES and not self.records.failure:
            self.records.failure = CheckpointError(
                f"{self._failures} saves in a row failed, the last at step {step}: {error}",
                "Free space on the disk of the run folder, or repair it, and submit again: the run resumes "
                "from its last checkpoint; no older one was removed.",
            )

    def owe_evaluation(self, step: int) -> None:
        """Leave the evaluation of a step to a job of its own, by a mark: now, or at the next save."""
        if self._world.is_main:
            self._to_owe.append(step)
            with self.records.keeping():
                self._owe()

    def owe_instead(self, step: int) -> None:
        """Owe the evaluation of `step`, which has a checkpoint, in place of earlier ones that have none."""
        with self.records.keeping():
            for lost in owe_instead(self.folder.attempt, step):
                logger.warning("step %d has no checkpoint: step %d is evaluated instead", lost, step)

    def _owe(self) -> None:
        while self._to_owe:
            owe(self.folder.attempt, self._to_owe[0])
            del self._to_owe[0]

    def record_evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Record the results of an evaluation with the checkpoint of its step, now or once it is written."""
        if not self._world.is_main:
            return
        self._evaluations[step] = dict(results)
        if self._write is None and self.durable_step == step:
            self._settle()
