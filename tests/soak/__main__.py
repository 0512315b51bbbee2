"""A soak: runs on a real SLURM cluster of this machine, disturbed at random, must all end as they should.

    python -m tests.soak --seconds 1800 --seed 7

Preemptions, kills of ranks, cancels, lost nodes and submissions come as the seed has them. Then what should
finish is left to finish, and compared, bit for bit, with runs that nothing disturbed. Prints what it does
and a table of what the runs lost and spent. Ends with 1 where anything was wrong, and keeps its folder then.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from clipcluster.runs.folder import Run
from jobs.state import Queue, State, state_of
from tests.soak import figures
from tests.soak.disturbance import Attendant, Disturbance
from tests.soak.fleet import Fleet, differences, left_over
from tests.soak.plan import Case, acts, cases
from tools.sandbox import sandbox as sandboxes
from tools.sandbox.config import DAEMONS, Sandbox
from tools.sandbox.processes import owned

ROOT = Path(__file__).resolve().parents[2]
LOOK_SECONDS = 2.0
TWICE_SECONDS = 5.0  # an ending is believed once it was seen for so long
PATIENCE_SECONDS = 600.0
TWIN_RANKS = 6  # of twins that run at once: a rank of torch with its loader worker takes 0.7 GB


class Soak:
    """One soak in a folder: what goes wrong is in `problems`."""

    def __init__(self, folder: Path, sandbox: Sandbox, seed: int, seconds: float) -> None:
        self.folder, self.sandbox, self.seed, self.seconds = folder, sandbox, seed, seconds
        self.began = time.monotonic()
        self.problems: list[str] = []
        self._log = (folder / "soak.log").open("a")
        self.fleet = Fleet(folder, cases(seconds), self.say)
        self.disturbance = Disturbance(sandbox, self.fleet)
        self._seen: dict[int, tuple[State, float]] = {}
        self._told: dict[int, tuple[str, int]] = {}  # how each ended, after how many attempts

    def say(self, line: str) -> None:
        """A line for the terminal and the log, with the seconds since the beginning."""
        text = f"[{time.monotonic() - self.began:7.1f} s] {line}"
        print(text, flush=True)
        print(text, file=self._log, flush=True)

    def problem(self, what: str) -> None:
        self.problems.append(what)
        self.say(f"PROBLEM: {what}")

    def disturb(self) -> None:
        """Do what the plan has, each act at its time or as soon as the one before it is done."""
        for act in acts(self.seed, self.seconds):
            while time.monotonic() - self.began < act.at:
                self.look()
                time.sleep(max(0.0, min(LOOK_SECONDS, self.began + act.at - time.monotonic())))
            self.say(f"{act.kind}: {self.disturbance.perform(act)}")

    def settle(self) -> None:
        """Restore the node, submit again what is still to finish, and wait for the end of all runs."""
        self.say(f"restore: {self.disturbance.restore()}")
        self._wait(lambda: self.look() and not self.disturbance.owed, "runs that should have ended go on")

    def look(self) -> bool:
        """Judge the runs that have ended; whether all have."""
        queue, waiting = Queue(self.sandbox.slurm), 0
        for case in self.fleet.cases:
            run = self.fleet.runs.get(case.number)
            if run is None or case.number in self._told or case.number in self.disturbance.owed:
                waiting += case.number not in self._told
                continue
            state = state_of(run, queue)
            before, since = self._seen.get(case.number, (None, 0.0))
            if state != before:
                self._seen[case.number] = state, time.monotonic()
            ended = state == before and state.ended and not state.queued
            if ended and time.monotonic() - since > TWICE_SECONDS:
                self._judge(case, run, state)
            waiting += case.number not in self._told
        return not waiting

    def _judge(self, case: Case, run: Run, state: State) -> None:
        """Whether a run may end so; what should have gone on is to be submitted again."""
        expected = {"finish": "FINISHED", "cancel": "CANCELLED", "fail": "FAILED"}[case.fate]
        broken = "shard 00003.tar changed" in state.detail
        if state.name == expected and (case.fate != "fail" or broken):
            self.say(f"{case.name} ended as it should: {state}, {len(run.attempts())} attempts")
            self._told[case.number] = state.name, len(run.attempts())
            return
        self._seen.pop(case.number)
        if case.fate != "cancel":
            self.disturbance.owed[case.number] = case
        if state.name == "FAILED" and "endings in a row" in state.detail:
            self.say(f"{case.name} was given up, and is to be submitted again: {state}")
            self.disturbance.done["given up"] += 1
        elif state.name == "LOST" and self._killed_with_its_old_step(state):
            self.say(f"{case.name} was killed by SLURM, and is to be submitted again: {state}")
            self.disturbance.done["killed by SLURM"] += 1
        else:
            self.problem(f"{case.name} is {state}")

    def _killed_with_its_old_step(self, state: State) -> bool:
        """Whether a node came back with ranks of the job while it was requeued, and SLURM killed both."""
        log = (self.sandbox.logs / "slurmctld.log").read_text(errors="replace")
        return f"Registered PENDING JobId={state.job} " in log

    def _wait(self, ended: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + self.seconds + PATIENCE_SECONDS
        while not ended():
            if time.monotonic() > deadline:
                self.problem(otherwise)
                return
            for case in list(self.disturbance.owed.values()):
                self.say(f"submit again: {self.disturbance.submit(case)}")
            time.sleep(LOOK_SECONDS)

    def compare(self) -> int:
        """Run the twins of what should have finished, and compare; how many are equal."""
        chosen = [case for case in self.fleet.cases if case.fate == "finish"]
        twins = dict[Case, Run]()
        self._wait(lambda: self._submit_twins(chosen, twins), "twins do not finish")
        equal = 0
        for case in chosen:
            run, twin = self.fleet.runs[case.number], twins.get(case)
            if twin is None or len(twin.attempts()) != 1 or not twin.finished() or not run.finished():
                self.problem(f"{case.name} or its twin did not finish as it should")
            elif found := differences(run, twin, case.steps):
                self.problem(f"{run.path} differs from {twin.path} in {', '.join(found)}")
            else:
                equal += 1
        return equal

    def _submit_twins(self, chosen: list[Case], twins: dict[Case, Run]) -> bool:
        """Submit twins still to come, the largest first, where there is room; whether all have finished."""
        ranks = sum(case.ranks for case, twin in twins.items() if not twin.finished())
        for case in sorted(chosen, key=lambda case: -case.ranks):
            if case not in twins and (not ranks or ranks + case.ranks <= TWIN_RANKS):
                twins[case] = self.fleet.submit(case, twin=True)
                ranks += case.ranks
        return ranks == 0

    def leave_nothing(self) -> None:
        """No job, no process and no file may be left of runs that have ended."""
        deadline = time.monotonic() + 30
        while (jobs := self.sandbox.slurm.queue()) and time.monotonic() < deadline:
            time.sleep(0.5)
        self.problems += [f"job {job.job_id} {job.name} is left: {job.state}" for job in jobs]
        while (tasks := self._tasks()) and time.monotonic() < deadline:
            time.sleep(0.5)
        self.problems += [f"a process is left: {task}" for task in tasks]
        for number, told in self._told.items():
            run = self.fleet.runs[number]
            now = state_of(run, Queue(self.sandbox.slurm)).name, len(run.attempts())
            if now != told:
                self.problem(
                    f"{run.name} was {told[0]} after {told[1]} attempts, and then {now[0]} after {now[1]}"
                )
        files = [path for run in self.fleet.runs.values() for path in left_over(run)]
        files += [*self._temporary(), *(self.folder / "runs").glob(".*.tmp")]
        self.problems += [f"a file is left: {path}" for path in files]

    def _temporary(self) -> list[Path]:
        """What is left in the folder of temporary files, but for what killed ranks had no time to remove."""
        left = [
            path for path in (self.folder / "tmp").iterdir() if not path.name.startswith("torchinductor_")
        ]
        sockets = [path for path in left if path.name.startswith("pymp-")]  # of ranks with loader workers
        killed = sum(
            case.ranks
            for case in self.fleet.cases
            for attempt in (self.fleet.runs[case.number].attempts() if case.torch else ())
            if attempt.outcome() is None
        )
        return left if len(sockets) > killed else [path for path in left if path not in sockets]

    def _tasks(self) -> list[str]:
        left = [process.pid for process in owned(self.sandbox) if process.kind not in DAEMONS]
        for process in psutil.process_iter(["pid", "cwd"]):
            inside = Path(process.info["cwd"] or "/").is_relative_to(self.folder / "runs")
            if inside and process.pid not in left:
                left.append(process.pid)
        return [_described(pid) for pid in left if psutil.pid_exists(pid)]

    def report(self, equal: int, held: float) -> None:
        """The table, and the problems that its figures show."""
        stories = [figures.story_of(run, Queue(self.sandbox.slurm)) for run in self.fleet.runs.values()]
        self.problems += figures.problems(stories)
        finished = sum(run.finished() for run in self.fleet.runs.values())
        done = ", ".join(f"{kind} {count}" for kind, count in self.disturbance.done.most_common())
        whole = time.monotonic() - self.began
        print(f"\nseed {self.seed}, {self.seconds:g} s of disturbance, {whole:,.0f} s in all")
        print(f"acts: {done}")
        print(
            f"runs: {len(stories)}, {finished} finished, {equal} of them equal to their uninterrupted twins"
        )
        for line in figures.table(stories, held, self.disturbance.evicted):
            print(line)


def _described(pid: int) -> str:
    try:
        return f"{pid} {' '.join(psutil.Process(pid).cmdline())[:200]}"
    except psutil.Error:
        return str(pid)


def soak(folder: Path, seed: int, seconds: float) -> list[str]:
    """Run one; returns the problems."""
    sandbox = sandboxes.start(folder / "sandbox", nodes=4)
    try:
        os.environ.update(sandbox.environment)
        one = Soak(folder, sandbox, seed, seconds)
        attendant = Attendant(sandbox)
        attendant.start()
        one.disturb()
        one.settle()
        held = sum(attendant.held.values())
        equal = one.compare()
        attendant.leave()
        one.leave_nothing()
        one.report(equal, held)
        return one.problems
    finally:
        sandboxes.stop(sandbox.folder, keep_logs=True, patience=0)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=1800, help="how long to disturb (default: 1800)")
    parser.add_argument("--seed", type=int, default=None, help="of the acts (default: a new one)")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    folder = Path(tempfile.mkdtemp(prefix=f"soak-{seed}-"))
    (folder / "tmp").mkdir()
    path = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "tests" / "jobs")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, path)), "TMPDIR": str(folder / "tmp")}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tempfile.tempdir = None  # found anew
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # the cluster is stopped first
    print(f"soak with seed {seed} in {folder}", flush=True)
    problems = ["it did not come to its end"]
    try:
        problems = soak(folder, seed, given.seconds)
    finally:
        for problem in problems:
            print(f"PROBLEM: {problem}")
        if problems:
            print(f"the soak with seed {seed} failed; everything is kept in {folder}")
        else:
            shutil.rmtree(folder)
            print("no problem was found")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
