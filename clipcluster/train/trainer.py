"""The training loop: fetch, step, log, save, evaluate, stop. It receives built parts and knows no cluster."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clipcluster.runs.attempts import Attempt
from clipcluster.runs.checkpoints import Parts
from clipcluster.runs.evaluations import drop_results_after
from clipcluster.runtime.outcome import CheckpointError, Failure, LostPeers, Outcome, advising_on_memory
from clipcluster.runtime.stop import Stop, Wish
from clipcluster.runtime.world import World, is_lost_peer
from clipcluster.train.deadline import Deadline
from clipcluster.train.evaluations import Evaluations, Interrupted
from clipcluster.train.metrics import Metrics
from clipcluster.train.progress import Feed, Progress
from clipcluster.train.records import Records
from clipcluster.train.resume import record_roll_back, restore
from clipcluster.train.saver import Saver
from clipcluster.train.step import Step, Streak
from clipcluster.train.stopwatch import Stopwatch

if TYPE_CHECKING:
    from clipcluster.data.loading.batch import Batch
    from clipcluster.model.task import Report


@dataclass
class Trainer:
    """Trains until the last step, or until all ranks agree to stop.

    Ranks act together: the wishes of all ranks (save, stop, abort) are reduced at every step boundary before
    any of them acts.

    Args:
        parts: what a checkpoint holds, by name.
        resumes: the parts wait for a checkpoint: the model has none of its starting weights.
        deadline: how much time this attempt has.
        memory_advice: advice for a step that does not fit into memory.
        results: metrics of the last evaluation in this attempt, by name.
        stopwatch: where this rank's seconds go, from its first batch on; rank 0 records it as `spent`.
    """

    world: World
    attempt: Attempt
    stop: Stop
    progress: Progress
    total_steps: int
    step: Step
    feed: Feed
    parts: Parts
    saver: Saver
    evaluations: Evaluations
    metrics: Metrics
    records: Records
    resumes: bool = False
    record_samples: bool = False
    deadline: Deadline = field(default_factory=Deadline)
    memory_advice: str = ""
    results: dict[str, float] = field(default_factory=dict)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    _waits: str = field(default="start", init=False)

    def __post_init__(self) -> None:
        self.step.backward.task.task.after_features = self.metrics.work.end

    def run(self) -> Outcome:
        """Train. Returns FINISHED or STOPPED once `outcome.json` is written and everything is durable.

        Raises a Failure (on all ranks together, and marked `agreed`, where it was found at a step boundary),
        StaleAttempt, LostPeers.
        """
        outcome = None
        try:
            outcome = self._run()
            return outcome
        except (RuntimeError, LostPeers) as error:
            if not is_lost_peer(error):
                raise
            self.saver.peers_lost()
            if isinstance(error, LostPeers):
                raise
            raise LostPeers(f"rank {self.world.rank} lost its peers: {error}") from error
        finally:
            self.feed.close()
            self.saver.finish()  # a checkpoint on its way is worth the wait, whatever ended the run
            self.metrics.close(patient=outcome is Outcome.FINISHED)

    def _run(self) -> Outcome:
        self.attempt.phase(self.world.rank, "checkpoint")
        if self.world.is_main:
            self.saver.folder.prepare()
        found = self._resume()
        if found:
            self.records.event("resume", checkpoint=found.name)
            self.metrics.say(f"resuming from {found.name}")
        self.metrics.open(self.progress)
        for line in self.step.optimizer.describe():
            self.metrics.say(line)
        self.attempt.phase(self.world.rank, "first batch")
        self.stopwatch.begin()
        if self.world.agree(self.stop.wishes()) & Wish.STOP:
            return self._stopped()
        while self._more():
            if self.evaluations.owed(self.progress):
                self._evaluate()
            else:
                batch = self._fetch()
                with advising_on_memory("a training step", self.memory_advice):
                    if self.step.needs_rehearsal:
                        with self.stopwatch.on("rehearsal"):
                            self.step.rehearse(batch)
                        self.metrics.restart_clock(self.progress.samples)
                    report = self.step(batch, self.progress)
                self._count(batch)
                self._enter(self.progress.step)  # before a checkpoint of this step is made
                if self.metrics.due(self.progress):
                    self._log(report)
            with self.stopwatch.on("save"):  # a write that is done is followed by the rotation
                wishes = self._wishes_to_stop() | self.saver.wishes(self.progress)
            wishes = self.world.agree(wishes | self.records.wishes())
            if wishes & Wish.ABORT:
                self.world.raise_first(self.records.failure)
            if wishes & Wish.STOP and self._more():
                return self._stopped()
            if wishes & Wish.SAVE:
                with self.stopwatch.on("save"):
                    self.saver.save(self.progress, self.parts, self.step.guard.first_unread())
                self._record_spent()
        with self.stopwatch.on("save"):
            self.saver.save_and_wait(self.progress, self.parts, self.step.guard.first_unread())
        return self._leave(Outcome.FINISHED, "all steps done")

    def _fetch(self) -> Batch:
        """The next batch; to wait for the first one is part of the start."""
        waits, self._waits = self._waits, "data"
        with self.stopwatch.on(waits):
            return self.feed.next()

    def _more(self) -> bool:
        return self.progress.step < self.total_steps or self.evaluations.owed(self.progress)

    def _resume(self) -> Path | None:
        """Continue from the newest checkpoint, on all ranks; None where there is none."""
        self.world.pulse.restart("restoring a checkpoint")
        found = restore(self.world, self.saver, self.progress, self.parts, self._enter)
        if self.resumes and found is None:
            raise CheckpointError(
                f"The checkpoints in {self.saver.folder.folder} were moved away while this attempt started.",
                "Put them back, or leave them away to begin from the first step, and submit again.",
            )
        if found is None and self.step.ema:
            self.step.ema.restart()  # wrapping has just given every rank the weights of rank 0
        self.attempt.step = self.progress.step
        if self.progress.step < self.total_steps:  # after the last one only an evaluation may be owed
            self.feed.open(self.progress)
        return found

    def _enter(self, step: int) -> None:
        """Enter the stage of a step, and record what trains where the stage changes."""
        if counts := self.step.stages.enter(step):
            self.world.pulse.restart("entering a stage")  # the steps that follow may compile
            by_part = {name: {"trainable": part[0], "of": part[1]} for name, part in counts.parts.items()}
            self.records.event("stage", **{**vars(counts), "step": step, "parts": by_part})
            self.metrics.say(str(counts))

    def _count(self, batch: Batch) -> None:
        """Count what the step consumed, and record its samples where the recipe asks for it."""
        self.progress.advance(batch)
        self.attempt.step = self.progress.step
        self.world.pulse.stepped()
        self.records.bad_samples(batch.bad)
        if self.record_samples:
            self.records.samples(self.progress.step, batch.keys)

    def _log(self, report: Report) -> None:
        """Write a line of metrics, and make the tests that wait for the device."""
        streak = self.step.guard.read()
        lr = self.step.schedule(self.progress.step - 1)
        skipped = {"skipped_steps": streak.total} if streak.total else {}
        with self.records.keeping():
            self.attempt.check()
        with self.records.keeping():
            bad = self.metrics.write(self.progress, report, lr=lr, bad=self.records.take_bad(), **skipped)
            self.stopwatch.add("data", self.metrics.waited_for_others)
            if bad and self.world.is_main:
                self.records.judge_bad()
        with self.records.keeping():
            self.metrics.write_unwritten()
        if self.stopwatch.due:
            self._record_spent()
        if streak.length > self.step.guard.limit:
            self._roll_back(streak)

    def _record_spent(self) -> None:
        """Record where the seconds of this attempt went so far, and of how many steps this one is."""
        self.records.event("spent", seconds=self.stopwatch.read(), total_steps=self.total_steps)

    def _roll_back(self, streak: Streak) -> None:
        """Roll back to the last checkpoint before a streak of non-finite steps, and skip its batches."""
        self.world.pulse.begin("rolling back")
        with self.stopwatch.on("save"):
            self.world.while_main(self.saver.finish)
        self._record_spent()
        try:
            record = partial(record_roll_back, self.saver.folder, self.progress, streak)
            self.world.while_main(record)
        except Failure as error:
            self.records.failure = error
            return
        with self.stopwatch.on("start"):
            found = self._resume()
        assert found
        self.records.event("roll_back", reason=str(streak), checkpoint=found.name)
        self.metrics.say(f"{streak}: back to {found.name}, without these batches")
        self.results = {}  # of a step that is undone
        self.metrics.forget_unwritten()
        if self.world.is_main:
            with self.records.keeping():
                drop_results_after(self.attempt, self.progress.step)
        self.metrics.restart_clock(self.progress.samples)

    def _owe_evaluation(self) -> None:
        """Leave it to a job of its own, and keep the checkpoint that is saved of this step until then."""
        self.progress.evaluated_step = self.progress.step
        self.saver.owe_evaluation(self.progress.step)
        self.metrics.say(f"the evaluation of step {self.progress.step:,} is left to a job of its own")

    def _evaluate(self) -> None:
        if self.evaluations.by_job:
            self._owe_evaluation()
            return
        self.world.pulse.begin("evaluating")
        advice = "Lower evaluate.batch_size, then submit again."
        began = time.monotonic()
        try:
            with advising_on_memory("an evaluation", advice), self.stopwatch.on("evaluate"):
                measured = self.evaluations.measure(self.progress, self._stop_evaluating)
        except Interrupted:
            return  # still owed; the boundary that follows agrees on the stop again
        self.progress.evaluated_step, self.results = self.progress.step, measured.metrics
        with self.records.keeping():
            self.metrics.write_results(self.progress, measured, averaged=self.step.ema is not None)
        self.records.event("evaluation", seconds=round(time.monotonic() - began, 3))
        with self.stopwatch.on("save"):
            self.saver.record_evaluation(self.progress.step, self.results)
        self._record_spent()
        self.metrics.restart_clock(self.progress.samples)

    def _stop_evaluating(self) -> None:
        if self.world.agree(self._wishes_to_stop()) & Wish.STOP:
            raise Interrupted

    def _wishes_to_stop(self) -> Wish:
        """This rank's; rank 0 stops in time for what a stop takes, once a save has shown how long that is."""
        if self.world.is_main and not self.stop.requested:
            saving = self.saver.seconds_to_stop()
            if saving and self.deadline.near(saving + 2 * self.world.pulse.long_seconds):
                self.stop.request(f"notice of the time limit, {self.deadline.left:.0f} s before it")
        return self.stop.wishes()

    def _stopped(self) -> Outcome:
        """Make the current step durable, then leave so that another attempt follows."""
        if self.stop.requested:
            limit = {"time_limit": True} if self.deadline.by_clock(self.stop) else {}
            self.records.own_event("stop_requested", reason=self.stop.reason, **limit)
        if self.progress.step:
            left = self.deadline.seconds_left(self.stop)
            sound = self.step.guard.first_unread()
            with self.stopwatch.on("save"):
                self.saver.save_and_wait(self.progress, self.parts, sound, seconds_left=left)
        return self._leave(Outcome.STOPPED, self.world.reason_to_stop(self.stop))

    def _leave(self, outcome: Outcome, reason: str) -> Outcome:
        """Write the outcome once everything is durable, and leave together."""
        with self.records.keeping():
            self.metrics.write_unwritten()
        self.world.raise_first(self.records.failure)
        self._record_spent()
        if self.world.is_main:
            self.attempt.end(outcome.name.lower(), outcome, reason)
        self.world.barrier()
        return outcome
