"""The acts of a soak, done to a sandbox and the runs on it."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

from clipcluster.errors import UserError
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import lines
from jobs.cancel import cancel
from jobs.state import Queue, state_of
from tests.ranks import kill_rank
from tests.soak.fleet import Fleet
from tests.soak.plan import Act, Case
from tools.sandbox import sandbox as sandboxes
from tools.sandbox.config import Sandbox
from tools.sandbox.preempt import SETTLE_SECONDS, preempt
from tools.slurm import JobState, SlurmRefused, SlurmUnavailable

LOOK_SECONDS = 0.5


class Attendant(threading.Thread):
    """What else happens on a cluster: lets requeued jobs start after seconds instead of SLURM's two minutes,
    takes nodes back into service as an administrator does, counts how long jobs hold nodes.

    held: seconds by job id, by squeue.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(daemon=True)
        self._slurm, self._over = sandbox.slurm, threading.Event()
        self._environment = {**os.environ, **sandbox.environment}
        self._pending: dict[str, float] = {}
        self.held: Counter[str] = Counter()

    def run(self) -> None:
        before = time.monotonic()
        while not self._over.wait(LOOK_SECONDS):
            with suppress(SlurmUnavailable, SlurmRefused):
                queue = self._slurm.queue()
                now = time.monotonic()
                for job in queue:
                    if job.state in ("RUNNING", "COMPLETING") and job.partition == "low":
                        self.held[job.job_id] += now - before
                before = now
                waiting = {
                    job.job_id for job in queue if job.reason == "BeginTime" and job.state == "PENDING"
                }
                self._pending = {job_id: self._pending.get(job_id, now) for job_id in waiting}
                for job_id, since in self._pending.items():
                    if now - since > SETTLE_SECONDS:
                        self._slurm.release(job_id)
                self._resume_nodes()

    def _resume_nodes(self) -> None:
        """SLURM drains a node to which a requeued job comes back before the node knows of the job's end."""
        for node in self._slurm.nodes():
            if node.reason == "Duplicate jobid" and node.state.startswith("drain"):
                command = ["scontrol", "update", f"NodeName={node.name}", "State=RESUME"]
                subprocess.run(command, env=self._environment, check=True)

    def leave(self) -> None:
        self._over.set()
        self.join()


class Disturbance:
    """Does one act after the other; `done` counts them, `owed` are the cases to be submitted again."""

    def __init__(self, sandbox: Sandbox, fleet: Fleet) -> None:
        self._sandbox, self._fleet = sandbox, fleet
        self._missing: str | None = None
        self.owed: dict[int, Case] = {}
        self.done: Counter[str] = Counter()
        self.evicted: list[float] = []
        self._acts: dict[str, Callable[[Act], str]] = {
            "submit": lambda act: self.submit(fleet.cases[act.run]),
            "submit again": self._submit_again,
            "preempt": self._preempt,
            "kill a rank": self._kill_a_rank,
            "cancel": lambda act: self._cancel(act, self._by_command),
            "scancel": lambda act: self._cancel(act, self._by_scancel),
            "cancel for good": self._cancel_for_good,
            "kill a node": lambda act: self._lose(act, sandboxes.kill_node),
            "lose a node": lambda act: self._lose(act, sandboxes.lose_node),
            "restore": lambda act: self.restore(),
        }

    def perform(self, act: Act) -> str:
        """Do it; returns what was done. Nothing is done where no run fits, or it ended a moment before."""
        try:
            said = self._acts[act.kind](act)
        except (UserError, SlurmRefused, SlurmUnavailable) as error:
            return f"nothing: {error}"
        self.done[act.kind] += not said.startswith("nothing")
        return said

    def submit(self, case: Case) -> str:
        """Submit a case, now or, where its old job is still ending, as soon as that has ended."""
        try:
            run = self._fleet.submit(case)
        except UserError as error:
            self.owed[case.number] = case
            return f"nothing yet: {error}"
        self.owed.pop(case.number, None)
        return run.name

    def restore(self) -> str:
        """Start the missing node again."""
        if self._missing is None:
            return "nothing: no node is missing"
        node = self._missing
        sandboxes.restore_node(self._sandbox.folder, node)
        self._missing = None
        return node

    def _submit_again(self, act: Act) -> str:
        cancelled = next(iter(self.owed.values()), None)
        if cancelled:
            return self.submit(cancelled)
        fitting = [
            case for case in self._from(act) if case.number in self._fleet.runs and case.fate != "cancel"
        ]
        return self.submit(fitting[0]) if fitting else "nothing was submitted yet"

    def _preempt(self, act: Act) -> str:
        for case, run, _ in self._with_job(act, "RUNNING"):
            done = preempt(self._sandbox.folder, run.path, come_back=False)
            self.evicted.append(done.evicted_after)
            state = "requeued" if done.requeued else done.state
            return f"{case.name} on {', '.join(done.nodes)}: {state} after {done.evicted_after:.1f} s"
        return "nothing runs"

    def _kill_a_rank(self, act: Act) -> str:
        for case, run, job in self._with_job(act, "RUNNING"):
            rank = int(act.draw * case.ranks)
            newest = run.newest()
            if newest is not None and kill_rank(newest, rank):
                return f"rank {rank} of {case.name} (job {job.job_id}), {steps_of(run)} steps logged"
        return "nothing runs"

    def _cancel(self, act: Act, end: Callable[[Run, JobState], None]) -> str:
        """End a run that runs or waits; it is to be submitted again later."""
        for case, run, job in self._with_job(act, "RUNNING", "PENDING"):
            if case.fate == "finish":
                self.owed[case.number] = case
                end(run, job)
                return f"{case.name} (job {job.job_id}, {job.state}), {steps_of(run)} steps logged"
        return "nothing runs or waits"

    def _cancel_for_good(self, act: Act) -> str:
        return cancel(self._fleet.runs[act.run], Queue(self._sandbox.slurm))

    def _by_command(self, run: Run, job: JobState) -> None:
        cancel(run, Queue(self._sandbox.slurm))

    def _by_scancel(self, run: Run, job: JobState) -> None:
        self._sandbox.slurm.cancel([job.job_id])

    def _lose(self, act: Act, end: Callable[..., int]) -> str:
        for case, _, job in self._with_job(act, "RUNNING"):
            if self._missing is None:
                self._missing = job.nodes[int(act.draw * len(job.nodes))]
                end(self._sandbox.folder, self._missing)
                return f"{self._missing}, on which {case.name} ran"
        return "nothing runs, or a node is missing already"

    def _from(self, act: Act) -> list[Case]:
        return self._fleet.cases[act.run :] + self._fleet.cases[: act.run]

    def _with_job(self, act: Act, *states: str) -> Iterator[tuple[Case, Run, JobState]]:
        """The cases in these states, from the act's own on; none on a node that is missing."""
        queue = Queue(self._sandbox.slurm)
        for case in self._from(act):
            run = self._fleet.runs.get(case.number)
            state = state_of(run, queue) if run else None
            if run is None or state is None or state.name not in states or not state.job:
                continue
            job = self._sandbox.slurm.job(state.job)
            if job is not None and job.state in states and self._missing not in job.nodes:
                yield case, run, job


def steps_of(run: Run) -> int:
    """The last step that any attempt logged."""
    return max((line["step"] for line in lines(run, "metrics.jsonl", step=int)), default=0)
