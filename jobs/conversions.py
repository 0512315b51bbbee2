"""Conversions that runs wait for: made here at once, or by an array of jobs on SLURM.

What converts is imported when it is needed: most runs wait for no conversion.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcluster.errors import UserError
from clipcluster.recipe.load import load_cluster
from clipcluster.runs import files
from clipcluster.text import did_you_mean
from jobs.state import Queue
from tools.slurm import SlurmRefused, SlurmUnavailable

if TYPE_CHECKING:
    from tools.convert.plan import Settings

LOOK_SECONDS = 1.0


class Conversion:
    """The conversion into the folder `out`."""

    def __init__(self, out: str | Path) -> None:
        self.out = Path(os.path.abspath(out))
        self.name = str(out)

    def __repr__(self) -> str:
        return f"Conversion({self.name!r}, {self.state})"

    @property
    def finished(self) -> bool:
        """Whether the shards are there."""
        from tools.convert.work import is_finished

        return is_finished(self.out)

    def queued(self, queue: Queue) -> list[str]:
        """Its jobs that SLURM shows."""
        return [job for job in self._jobs() if queue.job(job) is not None]

    def refuse_failed(self) -> None:
        """UserError where one of its jobs is known to have failed with shards that no other writes."""
        from jobs import convert as array

        for job in array.failed_jobs(self.out):
            log = self.out / array.FOLDER / array.LOG_FOLDER / f"{job}_0_log.err"
            raise UserError(
                f"{self.name}: job {job}, which makes a part of it, failed; its log: {log}. End the others "
                f"(scancel {job.partition('_')[0]}) and submit again: what is made already is kept."
            )

    def _jobs(self) -> list[str]:
        """Every job that was queued for it."""
        from jobs import convert as array

        known = files.read_object(self.out / array.FOLDER / array.JOB, jobs=list) or {"jobs": []}
        return list(known["jobs"])

    @property
    def state(self) -> str:
        """FINISHED, RUNNING, PENDING, or STOPPED where it is neither finished nor queued.

        UNKNOWN while SLURM, where its jobs were queued, gives no answer.
        """
        if self.finished:
            return "FINISHED"
        queue = Queue()
        if self._jobs() and queue.silent:
            return "UNKNOWN"
        shown = [queue.job(job) for job in self.queued(queue)]
        states = {job.state for job in shown if job is not None}
        return "STOPPED" if not states else "PENDING" if states == {"PENDING"} else "RUNNING"

    def wait(self, timeout: float | None = None) -> str:
        """Wait until it is finished, or not queued; returns the state. TimeoutError after `timeout` s."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (state := self.state) in ("RUNNING", "PENDING", "UNKNOWN"):
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} is {state} after {timeout:g} s")
            time.sleep(LOOK_SECONDS)
        return state

    def cancel(self) -> list[str]:
        """End its jobs, and say what was done, a line; converting again continues. Raises UserError."""
        queue = Queue()
        jobs = self.queued(queue)
        try:
            queue.slurm.cancel(jobs)
        except (SlurmUnavailable, SlurmRefused) as error:
            raise UserError(
                f"{self.out}: its jobs could not be ended ({error}); end them with: scancel {' '.join(jobs)}"
            ) from None
        return [f"{self.out}: " + (f"cancelled {', '.join(jobs)}" if jobs else "no jobs to cancel")]


def start(
    kind: str,
    inputs: Sequence[str | Path],
    out: str | Path,
    options: Mapping[str, Any],
    *,
    executor: str,
    jobs: int,
    cluster: Sequence[str],
    site: str | None,
    say: Callable[[str], None],
) -> Conversion:
    """Convert on this machine before this returns, or queue it on SLURM, unless it is finished or queued.

    Raises UserError as `clipcluster shards convert`.
    """
    conversion = Conversion(out)
    if conversion.finished:
        say(f"{out}: complete already")
        return conversion
    from jobs import convert as array
    from tools.convert.convert import convert as convert_here

    own, settings = _options(kind, options)
    paths = [Path(path).absolute() for path in inputs]
    if executor != "slurm":
        workers = len(os.sched_getaffinity(0))
        convert_here(kind, conversion.out, paths, own, settings, workers=workers)
        say(f"{out}: made")
    elif queued := conversion.queued(Queue()):
        say(f"{out}: being made by job {queued[0].partition('_')[0]}")
    else:
        job = array.ConvertJob(kind, conversion.out, paths, own, settings)
        ids = array.submit(job, load_cluster(["gpus_per_node=0", *cluster], site=site), jobs)
        say(f"{out}: to be made by job {ids[0].partition('_')[0]}, {len(ids)} tasks")
    return conversion


def _options(kind: str, given: Mapping[str, Any]) -> tuple[Any, Settings]:
    """A conversion's own options and those of every conversion. UserError for one that it has not."""
    from tools.convert.convert import kind_named
    from tools.convert.plan import Settings

    form = kind_named(kind).options
    names = [{field.name for field in dataclasses.fields(each)} for each in (form, Settings)]
    for name in given:
        if name not in names[0] | names[1]:
            known = sorted(names[0] | names[1])
            raise UserError(
                f"convert {kind}: no option {name}{did_you_mean(name, known) or f'; there are: {known}'}"
            )
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    own, settings = ({name: values[name] for name in values if name in part} for part in names)
    return form(**own), Settings(**settings)  # type: ignore[arg-type]
