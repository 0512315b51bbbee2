"""A site check: a short job on two nodes with everything that a run's job has, and what it reported."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runtime.stop import GRACE_SECONDS
from jobs.check.cluster import compare
from jobs.check.known import ask
from jobs.endings.log import tail
from jobs.sites import reports
from jobs.sites.task import SiteCheck
from jobs.submit import launch, parameters, placement, script, snapshot
from tools.slurm import JobState, Slurm, SlurmRefused, SlurmUnavailable

FOLDER = "site-checks"  # in the folder of runs
OVERRIDES = ("nodes=2", "time=5 min")  # of the profile; the command line comes after them
POLL_SECONDS = 0.5
ASK_SECONDS = 2.0
END_SECONDS = 15.0  # for the job to leave its nodes once it is cancelled
LINES = 12  # of the job's log, where a part of it did not report
# Reasons for which a job stays in the queue until somebody changes it, its limits or the cluster
# (squeue's manual page, "JOB REASON CODES").
_STAYS = re.compile(
    r"(?i)BadConstraints|Invalid|NotAllowed|NotPermitted|PerJob|held|DependencyNeverSatisfied|MaxMemPerLimit"
    r"|Partition(Node|Time)Limit|PartitionInactive|PartitionConfig|ReservationDeleted"
)


@dataclass
class Found:
    """What the job of a check reported.

    Attributes:
        job: its id.
        ranks: the reports by rank.
        batch: the batch script's; None where it made none.
        behind: of each rank, how much at most its clock is behind the submitter's, seconds.
        waits: why the job will not start, as SLURM says it.
        ended: what became of the job, where it ended before it had reported everything.
        log: the last lines of the job and its ranks.
    """

    cluster: Cluster
    job: str
    ranks: dict[int, dict[str, Any]] = field(default_factory=dict)
    batch: dict[str, Any] | None = None
    behind: dict[int, float] = field(default_factory=dict)
    waits: str = ""
    ended: str = ""
    log: str = ""

    @property
    def expected(self) -> int:
        """How many ranks there are."""
        return next((report["size"] for report in self.ranks.values()), 0)

    @property
    def complete(self) -> bool:
        """Whether nothing more will be reported."""
        return self.batch is not None and "requeue" in self.batch

    def end(self, state: JobState | None) -> None:
        """Note how the job ended, unless everything has been reported."""
        requeued = state is not None and state.restarts > 0
        if requeued and self.batch is not None:
            self.batch.setdefault("requeue", "")  # its own doing, which left no time to say so
        elif not self.complete:
            ended = f"ended as {state.state}" if state else "is unknown to SLURM"
            self.ended = "was requeued (preempted, a lost node, or a failing script)" if requeued else ended

    def look(self, folder: Path) -> None:
        """Read the reports, and the clocks in them; the batch script's first, for it is made last."""
        self.batch = reports.read(folder / reports.BATCH) or self.batch
        for file in folder.glob("rank-[0-9]*.json"):
            report = reports.read(file)
            if report is not None:
                rank, behind = report["rank"], time.time() - report["time"]
                self.behind[rank] = min(behind, self.behind.get(rank, behind))
                self.ranks[rank] = report


def refuse(cluster: Cluster, slurm: Slurm, say: Callable[[str], None]) -> None:
    """UserError for what SLURM does not have; what the job will wait for is said."""
    seen, warnings = placement.of_environment(cluster, os.environ)
    found = compare(seen, ask(slurm), lambda key: key)
    for line in warnings + found.warnings:
        say(f"warning: {line}")
    for line in found.unchecked:
        say(f"not compared with SLURM: {line}")
    if found.errors:
        raise UserError("\n".join(found.errors))


def run(cluster: Cluster, name: str, runs: Path, slurm: Slurm, say: Callable[[str], None]) -> Found:
    """Submit the check of the profile `name`, follow it to its end, and return what was reported.

    Nothing is left behind: neither the job, whatever interrupts this process, nor its files. What cannot be
    ended or removed is said. Raises UserError where SLURM refuses the job.
    """
    home = runs.absolute() / FOLDER
    launch.refuse_patterns(home)
    home.mkdir(parents=True, exist_ok=True)
    folder, job = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=home)), ""
    with _interrupted_by_signals():
        try:
            code = snapshot.take(folder)
            reports.tell_time(folder)
            task = SiteCheck(folder, cluster.gpus_per_node)
            chosen = _parameters(cluster, name, folder, code)
            job = launch.queue([task], cluster, chosen, folder / "submitit")[0]
            found = Found(cluster, job)
            _follow(found, folder, slurm, say)
            return found
        finally:
            _clean_up(folder, job, slurm, say)


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """What ends a program ends this one as Ctrl-C does: after it has cleaned up."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _parameters(cluster: Cluster, name: str, folder: Path, code: Path) -> dict[str, Any]:
    """submitit's parameters: the batch script of a run, but for what comes before and after the ranks."""
    setup = script.setup(
        cluster,
        shlex.quote(str(code)),
        f"-m jobs.sites.batch {shlex.quote(str(folder))}",
        logs=folder / "submitit",
        before_ranks=[
            f"if [ -e {shlex.quote(str(folder / reports.BATCH))} ]; then",
            "    clipcluster_code=0  # requeued by itself, to see whether it may",
            "    exit",
            "fi",
        ],
    )
    lead = parameters.lead_seconds(cluster.time.seconds, GRACE_SECONDS)
    return parameters.of_job(cluster, name=f"site-{name}", comment=str(folder), setup=setup, lead=lead)


def _follow(found: Found, folder: Path, slurm: Slurm, say: Callable[[str], None]) -> None:
    """Wait for the reports until they are complete or the job has ended, telling the ranks the time."""
    asked, said = 0.0, ""
    while not found.complete:
        reports.tell_time(folder)
        found.look(folder)
        if not found.complete and time.monotonic() - asked > ASK_SECONDS:
            asked = time.monotonic()
            state, told = _asked(found.job, slurm)
            if told != said:
                say(f"job {found.job}: {told}")
                said = told
            if state is not None and state.state == "PENDING" and _STAYS.search(state.reason):
                found.waits = state.reason
            if found.waits or _is_over(state):
                time.sleep(POLL_SECONDS)  # what is on its way
                found.look(folder)
                found.end(state)
                break
        time.sleep(POLL_SECONDS)
    found.log = tail(sorted((folder / "submitit").glob("*_log.err"))[:2], lines=LINES)


def _asked(job: str, slurm: Slurm) -> tuple[JobState | None, str]:
    """The job as SLURM sees it, and that in words. A silent SLURM is asked again the next time."""
    try:
        state = slurm.job(job)
    except (SlurmUnavailable, SlurmRefused) as error:
        unknown = JobState(job, "UNKNOWN", "None", "", 0, 0, None, None, (), None, ())
        return unknown, f"SLURM gives no answer ({' '.join(str(error).split())})"
    if state is None:
        return None, "SLURM no longer knows it"
    if state.state == "PENDING" and not state.restarts:
        reason = "" if state.reason == "None" else f" ({state.reason})"
        return state, f"waits{reason}; Ctrl-C cancels it"
    return state, f"{state.state} on {', '.join(state.nodes)}" if state.nodes else state.state


def _is_over(state: JobState | None) -> bool:
    """Whether the job has ended, or is back in the queue."""
    return state is None or state.ended or state.restarts > 0


def _clean_up(folder: Path, job: str, slurm: Slurm, say: Callable[[str], None]) -> None:
    """Cancel the job, wait until it writes no more, and remove its files, undisturbed by further signals.

    Where its id is not known it is found by its comment: sbatch may have accepted it without saying so.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        _end_job(job, str(folder), slurm, say)
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            say(f"{folder} could not be removed: some of it is still in use; remove it later")
        with suppress(OSError):  # another check is under way
            folder.parent.rmdir()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _end_job(job: str, comment: str, slurm: Slurm, say: Callable[[str], None]) -> None:
    """Cancel the job with this id or comment, which may have requeued itself, and wait for its end."""
    deadline, there = time.monotonic() + END_SECONDS, []
    try:
        while (there := _ids_of(job, comment, slurm)) and time.monotonic() < deadline:
            slurm.cancel(there)
            time.sleep(POLL_SECONDS)
    except (SlurmUnavailable, SlurmRefused) as error:
        say(f"the job could not be cancelled ({' '.join(str(error).split())}); find it with squeue --me")
    else:
        if there:
            say(f"job {', '.join(there)} is cancelled, and has not left its nodes yet")


def _ids_of(job: str, comment: str, slurm: Slurm) -> list[str]:
    mine = slurm.queue(user=str(os.getuid()))
    return [each.job_id for each in mine if each.job_id == job or each.comment == comment]
