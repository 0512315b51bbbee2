"""The local supervisor: runs a run on this machine, without SLURM, in place of the batch script.

It claims, starts and watches the ranks, keeps the time, and decides.

The ranks are submitit's local tasks, started from the same pickle as on SLURM. A stop by time or a crash is
followed by the next attempt; TERM or INT from outside ends the run as stopped. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import FrameType

from clipcluster.runs import files
from clipcluster.runs.attempts import Attempt
from clipcluster.runs.checkpoints import newest_complete
from clipcluster.runs.folder import AlreadyOwned, Run
from clipcluster.runtime.environment import ATTEMPT, ENDS, GRACE, LEAD, LOGS
from clipcluster.runtime.job_id import local_job_id
from clipcluster.runtime.outcome import Outcome
from clipcluster.runtime.stop import holding_signals
from jobs.endings import act, notify
from jobs.endings.facts import gather
from jobs.endings.log import marker, say
from jobs.endings.verdict import Facts, Job, Verdict, decide
from tools.slurm import Slurm

ORDER = "local.json"
PICKLE = "job.pkl"  # in submitit/: what the ranks are started from
POLL_SECONDS = 0.1
PEER_SECONDS = 10.0  # how long the peers of a crashed rank may take to leave by themselves
CLOSE_SECONDS = 60.0  # the same where a rank left in peace: the others may still close their loaders


@dataclass(frozen=True)
class Order:
    """What submit asks for in `local.json`; seconds, and `gpus` of this machine for all ranks together."""

    tasks: int
    gpus: int
    cpus_per_task: int
    time: float
    lead: float
    grace: float
    environment: Mapping[str, str]
    evaluations: bool = False  # whether a process beside the ranks starts jobs for owed evaluations


class Signals:
    """What was sent to this process: TERM and INT stop the run, USR1 and USR2 are passed on to the ranks."""

    def __init__(self) -> None:
        self.told = ""
        self.passed: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self.told = signal.Signals(number).name
        else:
            self.passed.append(number)


class Ranks:
    """The processes of one attempt, and what they have been sent so far."""

    def __init__(self, run: Run, attempt: Attempt, job_id: str, order: Order) -> None:
        self.order = order
        self.attempt = attempt
        self.began, self.ends = time.monotonic(), time.time() + order.time
        self.first_exit: float | None = None
        self.termed: float | None = None
        self.asked = False
        self.out_of_time = False
        self.processes = [_start(run, attempt, job_id, order, rank, self.ends) for rank in range(order.tasks)]

    def listening(self) -> bool:
        """Whether every rank has started: before its handlers are installed, a USR1 would kill it."""
        return len(list(self.attempt.path.glob("events-rank-*.jsonl"))) >= self.order.tasks

    def code(self) -> int:
        """The largest exit code, as srun would say it (a signal counts as 128 and its number)."""
        codes = [process.wait() for process in self.processes]
        return max(128 - code if code < 0 else code for code in codes)

    def send(self, number: int) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def watch(self, signals: Signals) -> None:
        """Wait until all ranks have left, sending and killing as time and signals ask."""
        while any(process.poll() is None for process in self.processes):
            now = time.monotonic()
            while signals.passed and self.listening():
                self.send(signals.passed.pop(0))
            left = self.began + self.order.time - now
            if left <= self.order.lead and not self.asked and self.listening():
                self.asked = True
                self.send(signal.SIGUSR1)
            self.out_of_time = self.out_of_time or left <= 0
            if (signals.told or self.out_of_time) and self.termed is None:
                self.termed = now
                self.send(signal.SIGTERM)
            if self._overdue(now):
                self.send(signal.SIGKILL)
            time.sleep(POLL_SECONDS)

    def _overdue(self, now: float) -> bool:
        """Whether the ranks that are left have had all the time they are given."""
        codes = [process.poll() for process in self.processes]
        if self.first_exit is None and any(code is not None for code in codes):
            self.first_exit = now
        if self.first_exit is not None:
            patience = PEER_SECONDS if any(codes) else CLOSE_SECONDS
            if now - self.first_exit > patience:
                return True
        return self.termed is not None and now - self.termed > self.order.grace


def _start(
    run: Run, attempt: Attempt, job_id: str, order: Order, rank: int, ends: float
) -> subprocess.Popen[bytes]:
    """One of submitit's local tasks, as its own controller would start it."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(order.cpus_per_task),
        **order.environment,
        ATTEMPT: str(attempt.number),
        LOGS: str(run.submitit),
        GRACE: str(order.grace),
        LEAD: str(order.lead),
        ENDS: str(ends),
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": job_id,
        "SUBMITIT_LOCAL_NTASKS": str(order.tasks),
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_GLOBALID": str(rank),
        "SUBMITIT_LOCAL_LOCALID": str(rank),
        "CUDA_VISIBLE_DEVICES": visible_gpus(order.gpus),
    }
    paths = [run.submitit / f"{job_id}_{rank}_log.{kind}" for kind in ("out", "err")]
    with paths[0].open("ab") as out, paths[1].open("ab") as err:
        return subprocess.Popen(
            [*holding_signals(sys.executable), "-u", "-m", "submitit.core._submit", str(run.submitit)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )


def visible_gpus(gpus: int) -> str:
    """The first so many of the GPUs that this process may see."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(number) for number in range(gpus)] if given is None else given.split(",")
    return ",".join(devices[:gpus])


def live(run: Run) -> int:
    """Attempt after attempt until a verdict ends the run; returns its code."""
    signals = Signals()
    job_id = local_job_id()
    order = Order(**files.read_json(run.submitit / ORDER))
    shutil.copy(run.submitit / PICKLE, run.submitit / f"{job_id}_submitted.pkl")
    if order.evaluations:  # it outlives this process until nothing is left to start
        command = [sys.executable, "-m", "jobs.submit.evaluations", str(run.path), "watch", str(os.getpid())]
        subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while True:
        try:
            attempt = act.claim(run, job_id, Slurm())
        except AlreadyOwned as error:
            say(str(error))
            return int(Outcome.STALE)
        if attempt is None:
            return int(Outcome.FINISHED)
        # what the batch script's own lines do on SLURM: the attempt begins here in the first rank's log
        with (run.submitit / f"{job_id}_0_log.err").open("a") as stream:
            stream.write(f"clipcluster: {marker(attempt)}\n")
        ranks = Ranks(run, attempt, job_id, order)
        ranks.watch(signals)
        try:
            seen = gather(run, attempt, ranks.code(), job_id=job_id, logs=run.submitit)
            seen = replace(
                seen,
                told=signals.told,
                job=Job(running=not ranks.out_of_time, time_limit=ranks.out_of_time),
                time_nearly_over=ranks.asked or seen.time_nearly_over,
            )
            verdict = decide(seen)
        except Exception as error:  # nobody else would end the run
            traceback.print_exc()
            seen = Facts(ranks.code(), checkpoint=newest_complete(run.checkpoints))
            reason = f"no verdict (code {seen.code} of the ranks): {type(error).__name__}: {error}"
            verdict = Verdict("fail", "not judged", Outcome.ERROR, reason)
        if not act.record(run, attempt, seen, verdict, job_id):
            return int(Outcome.STALE)
        notify.start(run, attempt, seen, verdict)
        if verdict.action != "requeue":
            return verdict.code
