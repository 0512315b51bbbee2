"""Runs, and a trainee without torch, for the tests of this room."""

import os
import signal
import time
from pathlib import Path

import pytest

from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs.folder import Run
from clipcluster.runtime.job_id import local_job_runs
from jobs.endings import history
from jobs.state import Queue, state_of
from jobs.submit import launch, snapshot

HERE = Path(__file__).resolve().parent


@pytest.fixture
def run(tmp_path):
    """A run folder without attempts."""
    return Run.create(tmp_path / "runs" / "toy-00000000", {"name": "toy"}, {"plan": {"total_steps": 20}})


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    """A PATH on which no program of SLURM can be found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in ("git", "sh", "bash", "env", "ldconfig", "gcc"):
        for place in os.environ["PATH"].split(os.pathsep):
            if os.access(os.path.join(place, program), os.X_OK):
                (folder / program).symlink_to(os.path.join(place, program))
                break
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture(scope="session")
def code(tmp_path_factory):
    """One snapshot for all local runs."""
    return snapshot.take(tmp_path_factory.mktemp("code"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The demo's data, converted once."""
    from tools.convert.convert import convert

    folder = tmp_path_factory.mktemp("data") / "digits"
    convert("digits", folder)
    return folder


@pytest.fixture
def recipe(digits, monkeypatch):
    """The demo's recipe, its data in place."""
    monkeypatch.setenv("DIGITS", str(digits))
    return HERE.parents[1] / "recipes" / "digits.yaml"


class Local:
    """Starts a run on this machine with the trainee, and waits for what becomes of it."""

    def __init__(self, code, monkeypatch):
        self.code, self.monkeypatch, self.jobs = code, monkeypatch, []
        monkeypatch.setenv("PYTHONPATH", str(HERE))

    def start(self, run, orders="{}", *, tasks=2, time="10 min", grace=5.0):
        self.monkeypatch.setenv("TRAINEE", orders)
        cluster = Cluster(gpus_per_node=0, tasks_per_node=tasks, cpus_per_task=1, time=time)
        self.jobs.append(launch.locally(cluster, run, self.code, grace=grace, trainee="trainee:train"))
        assert launch.await_claim(run, self.jobs[-1])
        return self.jobs[-1]

    def pid(self):
        return int(self.jobs[-1].split("-")[-2])

    def until(self, what, seconds=30):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = what()
            if found:
                return found
            time.sleep(0.05)
        pytest.fail(f"not within {seconds} s")

    def at_step(self, run, step, attempt=1):
        path = run.attempts_dir / str(attempt) / "metrics.jsonl"
        self.until(lambda: path.exists() and f'"step":{step},' in path.read_text())

    def verdict(self, run, attempt=1):
        folder = run.attempts_dir / str(attempt)
        return self.until(lambda: folder.exists() and history.last_verdict(run.attempt(attempt)))

    def end(self, run):
        """The state in which the run ends, once its process has left."""

        def state():
            found = state_of(run, Queue())
            return found if found.ended and not found.queued else None

        return self.until(state)


@pytest.fixture
def local(code, monkeypatch):
    bench = Local(code, monkeypatch)
    yield bench
    for job in bench.jobs:
        if local_job_runs(job):
            os.kill(int(job.split("-")[-2]), signal.SIGTERM)
