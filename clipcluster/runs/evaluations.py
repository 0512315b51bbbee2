"""The evaluations that a training leaves to jobs of their own (`evaluate.where: job`). No torch.

evals/owed/step-00001234-1a2b       a mark: while it is there, the step's checkpoint stays
evals/failed/step-00001234-1a2b     the mark of one that a job gave up
evals/jobs/RUN-eval-00001234-1a2b/  the run folder of the job that measures it: settings, attempts, logs
evals/step-00001234.json            the results

The training makes a mark, and a job removes it once the results are there: whatever ends either of them in
between, the evaluation is still owed.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.checkpoints import EVALUATION, is_complete, name_of, step_of, steps_in
from clipcluster.runs.files import fsync_folder, read_object, write_json
from clipcluster.runs.folder import Run

OWED, FAILED, JOBS = "owed", "failed", "jobs"
_JOB = re.compile(r".+-eval-(\d{8,}-[0-9a-f]{4})")


@dataclass(frozen=True)
class Owed:
    """One owed evaluation of a run; `name` is that of its mark, STEP-TOKEN.

    The token tells it from an earlier one of the same step, which a roll-back or a failure repeats.
    """

    run: Run = field(compare=False)
    name: str

    @property
    def step(self) -> int:
        step = step_of(self.name.rpartition("-")[0])
        assert step is not None
        return step

    @property
    def mark(self) -> Path:
        """Present while the evaluation is owed."""
        return self.run.evals / OWED / self.name

    @property
    def checkpoint(self) -> Path:
        return self.run.checkpoints / name_of(self.step)

    @property
    def job(self) -> Run:
        """The run folder of its job; `of_job` is the way back."""
        return Run(self.run.evals / JOBS / f"{self.run.name}-eval-{self.name.removeprefix('step-')}")

    def settle(self, document: dict[str, Any], details: dict[str, Any]) -> None:
        """Write the results (`step`, `samples`, `epoch`, `attempt`, `ema`, `metrics`), then remove the mark.

        They stand in `evals/`, as does what is behind them (`details`: `step`, `attempt`, `sets`), and beside
        the checkpoint for the rotation.
        """
        write_json(self.run.evals / f"details-{self.step:08d}.json", details)
        write_json(self.run.evals / f"{name_of(self.step)}.json", document)
        if self.checkpoint.exists():
            write_json(self.checkpoint / EVALUATION, {"step": self.step, "metrics": document["metrics"]})
        self.mark.unlink(missing_ok=True)
        fsync_folder(self.mark.parent)

    def give_up(self) -> None:
        """Let go of the checkpoint; `owe_failed` owes the evaluation again."""
        folder = self.run.evals / FAILED
        folder.mkdir(exist_ok=True)
        os.rename(self.mark, folder / self.name)
        fsync_folder(folder)


def owe(attempt: Attempt, step: int) -> Owed:
    """Owe the evaluation of a step, durably, before its checkpoint is written; once where it is owed already.

    Rank 0 alone calls it. Raises StaleAttempt, OSError.
    """
    run = Run(attempt.run)
    known = [owed for owed in owed_by(run) if owed.step == step]
    if known:
        return known[0]
    attempt.check()
    owed = Owed(run, _new_name(step))
    owed.mark.parent.mkdir(parents=True, exist_ok=True)
    write_json(owed.mark, {"step": step, "attempt": attempt.number, "time": round(time.time(), 3)})
    return owed


def owe_instead(attempt: Attempt, step: int) -> list[int]:
    """Owe the evaluation of `step`, which has a checkpoint, in place of those of earlier steps without one.

    These get none any more: the save failed or was dropped for a newer one, or the checkpoint was set aside.
    Returns their steps. Rank 0 alone calls it. Raises StaleAttempt, OSError.
    """
    run = Run(attempt.run)
    before = [owed for owed in owed_by(run) if owed.step < step]
    there = set(steps_in(run.checkpoints)) if before else set()
    lost = [owed for owed in before if step in there and owed.step not in there]
    if lost:
        owe(attempt, step)
    for owed in lost:
        attempt.check()
        owed.mark.unlink(missing_ok=True)
    return [owed.step for owed in lost]


def owed_by(run: Run) -> list[Owed]:
    """What the run owes, by step."""
    return list(_marks(run, OWED))


def failed_of(run: Run) -> list[Owed]:
    """What was given up, by step."""
    return list(_marks(run, FAILED))


def _marks(run: Run, kind: str) -> Iterator[Owed]:
    try:
        names = sorted(os.listdir(run.evals / kind))
    except FileNotFoundError:
        return
    found = [Owed(run, name) for name in names if step_of(name.rpartition("-")[0]) is not None]
    yield from sorted(found, key=lambda owed: owed.step)


def of_job(job: Run) -> Owed:
    """The evaluation that this run folder of a job belongs to. Raises UserError for another folder."""
    match = _JOB.fullmatch(job.name)
    if match is None or job.path.parent.name != JOBS:
        raise UserError(f"{job.path} is not the folder of an evaluation's job")
    return Owed(Run(job.path.parents[2]), f"step-{match[1]}")


def attempt_of(owed: Owed) -> int | None:
    """The number of the training's attempt that owes it; None once it is no longer owed."""
    mark = read_object(owed.mark, attempt=int)
    return mark["attempt"] if mark else None


def drop_after(attempt: Attempt, step: int) -> None:
    """Owe nothing of later steps, which a resume from `step` repeats. Raises StaleAttempt."""
    for owed in owed_by(Run(attempt.run)):
        if owed.step > step:
            attempt.check()
            owed.mark.unlink(missing_ok=True)


def drop_results_after(attempt: Attempt, step: int) -> None:
    """Remove the results of later steps, whose weights a roll-back undid. Raises StaleAttempt, OSError."""
    for path in [*Run(attempt.run).evals.glob("step-*.json"), *Run(attempt.run).evals.glob("details-*.json")]:
        number = path.stem.rpartition("-")[2]
        if number.isdecimal() and int(number) > step:
            attempt.check()
            path.unlink(missing_ok=True)


def owe_failed(run: Run) -> list[Owed]:
    """Owe again, under new names, what was given up; returns what is forgotten: its checkpoint is gone.

    What has a checkpoint that cannot be read now stays given up. Raises OSError.
    """
    owed, there, gone = {each.step for each in owed_by(run)}, set(steps_in(run.checkpoints)), []
    for failed in failed_of(run):
        mark = run.evals / FAILED / failed.name
        if failed.step in owed or failed.step not in there:
            mark.unlink()
            gone += [] if failed.step in owed else [failed]
        elif is_complete(failed.checkpoint):
            again = Owed(run, _new_name(failed.step))
            again.mark.parent.mkdir(exist_ok=True)
            os.rename(mark, again.mark)
            owed.add(failed.step)
    return gone


def _new_name(step: int) -> str:
    return f"{name_of(step)}-{secrets.token_hex(2)}"
