"""A throwaway SLURM cluster for the tests of this folder, and a bench for runs without torch on it."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics
from jobs.endings import history
from jobs.state import Queue, state_of
from jobs.submit import launch, snapshot
from tests.consumed import merged_samples
from tools.sandbox import sandbox as sandboxes
from tools.sandbox.config import ADMIN_FOLDERS, Sandbox, slurm_conf
from tools.sandbox.preempt import Preemption, preempt, release

MISSING = (
    "SLURM tests skipped: no slurmctld on this machine (apt-get install --no-install-recommends slurm-wlm)"
)


def need_slurm() -> None:
    """Skip, with one loud line, where SLURM is not installed."""
    places = [shutil.which("slurmctld"), *(shutil.which("slurmctld", path=place) for place in ADMIN_FOLDERS)]
    if not any(places):
        warnings.warn(MISSING, stacklevel=2)
        pytest.skip(MISSING)


@pytest.fixture
def cluster(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The same sandbox, left without jobs and with all its nodes up, whatever the test did to it."""
    yield sandbox
    for node in sandbox.nodes:
        sandboxes.restore_node(sandbox.folder, node)
    deadline = time.monotonic() + 30
    while (jobs := sandbox.slurm.queue()) and time.monotonic() < deadline:
        sandbox.slurm.cancel([job.job_id for job in jobs if job.state != "COMPLETING"])
        time.sleep(0.1)


@pytest.fixture(scope="session")
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """Four nodes n1 to n4 of 4 CPUs; GraceTime 10 s, KillWait 5 s; partitions low (default) and high.

    `@pytest.mark.parametrize("sandbox", [False, True], indirect=True)`: with True the site sends USR2 at a
    preemption (preempt_send_user_signal). With pairs of texts the first of each is replaced in slurm.conf.
    """
    need_slurm()
    room = Path(tempfile.mkdtemp(prefix="clipcluster-test-", dir="/tmp"))
    folder, param = room / "sandbox", getattr(request, "param", False)
    changes = () if isinstance(param, bool) else param
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sandboxes, "slurm_conf", lambda sandbox: changed(slurm_conf(sandbox), changes))
            sandbox = sandboxes.start(folder, nodes=4, user_signal=param is True)
        yield sandbox
    finally:
        sandboxes.stop(folder, patience=0)
        shutil.rmtree(room, ignore_errors=True)


def changed(text: str, changes: Iterable[tuple[str, str]]) -> str:
    """The text with the second of each pair in place of the first, which it must hold."""
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


TRAINEES = Path(__file__).resolve().parents[1] / "jobs"


@pytest.fixture(scope="session")
def code(tmp_path_factory):
    """One snapshot for all runs: taking it is tested elsewhere."""
    return snapshot.take(tmp_path_factory.mktemp("code"))


class Bench:
    """Submits torch-free runs to the sandbox and watches them."""

    def __init__(self, sandbox, folder, code, monkeypatch):
        self.sandbox, self.folder, self.code, self.monkeypatch = sandbox, folder, code, monkeypatch
        self.slurm = sandbox.slurm
        monkeypatch.setenv("SLURM_CONF", str(sandbox.conf))
        monkeypatch.setenv("PYTHONPATH", str(TRAINEES))
        self.jobs = []

    def submit(self, orders, **more):
        """A new run and its job's id."""
        run = Run.create(self.folder / f"run-{time.monotonic_ns()}", {"name": "run"}, {"none": 0})
        return run, self.submit_again(run, orders, **more)

    def submit_again(
        self, run, orders, *, nodes=1, tasks=2, code=None, environment=None, used=None, **cluster
    ):
        settings = Cluster(
            nodes=nodes,
            gpus_per_node=0,
            tasks_per_node=tasks,
            cpus_per_task=1,
            partition="low",
            environment={"TRAINEE": json.dumps(orders), **(environment or {})},
            **{"time": "10 min", **cluster},
        )
        used = {"used": used} if used else {}
        job = launch.on_slurm(settings, run, code or self.code, grace=5, trainee="trainee:train", **used)
        self.jobs.append(job)
        return job

    def until(self, what, seconds=60):
        """Wait until `what()` is true, and return it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = what()
            if found:
                return found
            time.sleep(0.1)
        pytest.fail(f"not within {seconds} s\n{self.story()}")

    def story(self):
        """What is known, for a failed test."""
        parts = [(self.sandbox.logs / "slurmctld.log").read_text()[-3000:]]
        parts += [subprocess.run(["squeue", "--array"], capture_output=True, text=True).stdout]
        for path in sorted(self.folder.rglob("*_log.err")) + sorted(
            self.folder.rglob("events-verdict.jsonl")
        ):
            parts.append(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)

    def at_step(self, run, step, *, attempt=1):
        """Wait until the run's attempt has logged this step."""
        path = run.attempts_dir / str(attempt) / "metrics.jsonl"
        self.until(lambda: path.exists() and f'"step":{step},' in path.read_text())

    def verdict(self, run, attempt, seconds=60):
        """The verdict on an attempt, once there is one."""
        folder = run.attempts_dir / str(attempt)
        return self.until(lambda: folder.exists() and history.last_verdict(run.attempt(attempt)), seconds)

    def come_back(self, job):
        """Let a requeued job start now, once it has left its nodes.

        SLURM holds it back for two minutes: the end of its old script must not be taken for its new one's.
        """
        self.until(lambda: self.slurm.job(job).state == "PENDING")
        time.sleep(1)
        release(self.sandbox.folder, job)

    def gone(self, job, seconds=60):
        """Wait until the job has left the queue for good; its state as SLURM remembers it."""
        self.until(lambda: not self.slurm.queue(job_ids=[job]), seconds)
        return self.slurm.job(job).state

    def state(self, run):
        return state_of(run, Queue(self.slurm))

    def finished(self, run, job, attempt, steps, nodes):
        """The attempt finishes the run, and nothing is missing of it."""
        verdict = self.verdict(run, attempt)
        assert (verdict["event"], verdict["ending"], verdict["code"]) == ("finish", "finished", 0)
        assert self.gone(job) == "COMPLETED"
        assert str(self.state(run)) == "FINISHED"
        self.check_whole(run, steps, 2 * nodes)

    def check_whole(self, run, steps, ranks):
        """Every step was consumed once by every rank, and logged, as in an uninterrupted run."""
        assert [line["step"] for line in merged_metrics(run)] == list(range(1, steps + 1))
        consumed = [(line["step"], line["slot"]) for line in merged_samples(run)]
        assert consumed == [(step, rank) for step in range(1, steps + 1) for rank in range(ranks)]


@pytest.fixture
def bench(sandbox, tmp_path, code, monkeypatch):
    bench = Bench(sandbox, tmp_path, code, monkeypatch)
    yield bench
    bench.slurm.cancel(bench.jobs)
    deadline = time.monotonic() + 30
    while bench.slurm.queue(job_ids=bench.jobs) and time.monotonic() < deadline:
        time.sleep(0.2)


@pytest.fixture
def preempt_and_watch(sandbox: Sandbox) -> Callable[[str], tuple[Preemption, float]]:
    """Preempts a job; also returns the seconds from the signal to its ranks until its nodes were free."""

    def watched(job: str) -> tuple[Preemption, float]:
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(preempt, sandbox.folder, job, come_back=False)
            signalled = None
            while not done.done():
                seen, now = sandbox.slurm.job(job), time.monotonic()
                if signalled is None and seen.preempt_time:
                    signalled = now  # SLURM sends the signal when it sets this time
                if signalled is not None and seen.state == "PENDING":
                    return done.result(), now - signalled
                time.sleep(0.02)
        raise AssertionError(f"job {job} was not preempted: {done.result()}")

    return watched
