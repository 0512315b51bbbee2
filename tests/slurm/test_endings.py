"""Endings on a real SLURM cluster: the real TrainJob, batch script and verdict, a trainee without torch."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from clipcluster.recipe.schema import Cluster
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics, merged_samples
from jobs import history, launch, snapshot
from jobs.cancel import cancel
from jobs.cluster import Member
from jobs.status import Queue, state_of
from tools import sandbox as sandboxes

pytestmark = pytest.mark.slurm
TRAINEES = Path(__file__).resolve().parents[1] / "jobs"


@pytest.fixture(scope="session")
def code(tmp_path_factory):
    """One snapshot for all runs: taking it is tested elsewhere."""
    run = Run.create(tmp_path_factory.mktemp("code") / "run", {"name": "code"}, {"none": 0})
    return snapshot.take(run).path


class Bench:
    """Submits torch-free runs to the sandbox and watches them."""

    def __init__(self, sandbox, folder, code, monkeypatch):
        self.sandbox, self.folder, self.code, self.monkeypatch = sandbox, folder, code, monkeypatch
        self.slurm = sandbox.slurm
        monkeypatch.setenv("SLURM_CONF", str(sandbox.conf))
        monkeypatch.setenv("PYTHONPATH", str(TRAINEES))
        self.jobs = []

    def submit(self, orders, *, nodes=1, tasks=2, members=1, code=None, environment=None, **cluster):
        """Runs (and their job ids) of one job, or of an array with so many members."""
        runs = [
            Run.create(self.folder / f"run-{time.monotonic_ns()}-{n}", {"name": "run"}, {"none": 0})
            for n in range(members)
        ]
        return runs, self.submit_again(
            runs, orders, nodes=nodes, tasks=tasks, code=code, environment=environment, **cluster
        )

    def submit_again(self, runs, orders, *, nodes=1, tasks=2, code=None, environment=None, **cluster):
        settings = Cluster(
            nodes=nodes,
            gpus_per_node=0,
            tasks_per_node=tasks,
            cpus_per_task=1,
            partition="low",
            environment={"TRAINEE": json.dumps(orders), **(environment or {})},
            **{"time": "10 min", **cluster},
        )
        jobs = launch.on_slurm(
            settings,
            [Member(run.path, code or self.code) for run in runs],
            name="endings",
            logs=runs[0].submitit if len(runs) == 1 else self.folder / "sweep" / "submitit",
            grace=5,
            trainee="trainee:train",
        )
        self.jobs += jobs
        return jobs

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
        parts = [subprocess.run(["squeue", "--array"], capture_output=True, text=True).stdout]
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

        SLURM holds it back for two minutes so that the end of its old script cannot be taken for its new one's.
        """
        self.until(lambda: self.slurm.job(job).state == "PENDING")
        time.sleep(1)
        sandboxes.release(self.sandbox.folder, job)

    def gone(self, job):
        """Wait until the job has left the queue for good; its state as SLURM remembers it."""
        self.until(lambda: not self.slurm.queue(job_ids=[job]))
        return self.slurm.job(job).state

    def state(self, run):
        return state_of(run, Queue(self.slurm))

    def check_whole(self, run, steps, ranks):
        """Every step was consumed once by every rank, and logged, as in an uninterrupted run."""
        assert [line["step"] for line in merged_metrics(run)] == list(range(1, steps + 1))
        consumed = [(line["step"], line["slot"]) for line in merged_samples(run)]
        assert consumed == [(step, rank) for step in range(1, steps + 1) for rank in range(ranks)]


@pytest.fixture
def bench(sandbox, tmp_path, code, monkeypatch):
    bench = Bench(sandbox, tmp_path, code, monkeypatch)
    yield bench
    bench.slurm.cancel({job.split("_")[0] for job in bench.jobs})
    deadline = time.monotonic() + 30
    while bench.slurm.queue(job_ids=bench.jobs) and time.monotonic() < deadline:
        time.sleep(0.2)


# Each scenario is one line of the table. They run on one job or on a member of an array (the others must
# not notice), on one node or two, on sites that send USR2 at a preemption and on those that do not.


def preempted(bench, nodes, members):
    runs, jobs = bench.submit({"steps": 40}, nodes=nodes, members=members)
    run, job = runs[-1], jobs[-1]
    bench.at_step(run, 7)
    done = sandboxes.preempt(bench.sandbox.folder, job, come_back=False)
    assert done.requeued
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"], verdict["counts"]) == ("requeue", "preempted", False)
    saved = run.attempt(1).outcome()
    assert saved["outcome"] == "stopped"
    assert verdict["checkpoint"] == saved["step"] >= 7
    assert done.evicted_after < bench.sandbox.grace_seconds
    bench.come_back(job)
    finished(bench, run, job, 2, 40, nodes)
    assert history.newest_checkpoint(run) == 40


def finished(bench, run, job, attempt, steps, nodes):
    verdict = bench.verdict(run, attempt)
    assert (verdict["event"], verdict["ending"], verdict["code"]) == ("finish", "finished", 0)
    assert bench.gone(job) == "COMPLETED"
    assert str(bench.state(run)) == "FINISHED"
    bench.check_whole(run, steps, 2 * nodes)


def crashed(bench, nodes, members):
    last = 2 * nodes - 1
    runs, jobs = bench.submit(
        {"steps": 15, "crash": {"step": 8, "rank": last, "attempts": [1]}}, nodes=nodes, members=members
    )
    run, job = runs[-1], jobs[-1]
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"], verdict["counts"]) == ("requeue", "crashed", True)
    assert verdict["checkpoint"] == 5
    assert verdict["blamed"] in bench.sandbox.nodes
    bench.come_back(job)
    finished(bench, run, job, 2, 15, nodes)


def failed(bench, nodes, members):
    runs, jobs = bench.submit(
        {"steps": 15, "raises": {"step": 3, "rank": 1, "error": "DataError"}}, nodes=nodes, members=members
    )
    run, job = runs[-1], jobs[-1]
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"], verdict["code"]) == ("fail", "failed", 90)
    assert "shard 00003.tar changed (rank 1 on" in verdict["reason"]
    assert verdict["advice"]
    assert bench.gone(job) == "FAILED"
    assert len(run.attempts()) == 1
    assert bench.state(run).name == "FAILED"


def stopped(bench, nodes, members):
    runs, jobs = bench.submit({"steps": 30}, nodes=nodes, members=members)
    run, job = runs[-1], jobs[-1]
    bench.at_step(run, 6)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"], verdict["counts"]) == ("requeue", "stopped", False)
    bench.come_back(job)
    finished(bench, run, job, 2, 30, nodes)


def scancelled(bench, nodes, members):
    runs, jobs = bench.submit({"steps": 300}, nodes=nodes, members=members)
    run, job = runs[-1], jobs[-1]
    bench.at_step(run, 6)
    subprocess.run(["scancel", job], check=True)
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"], verdict["code"]) == ("cancel", "cancelled", 130)
    assert run.cancelled_jobs() == {job}
    assert bench.gone(job) == "CANCELLED"
    assert bench.state(run).name == "CANCELLED"
    assert run.attempt(1).outcome()["outcome"] == "stopped"  # the ranks had time to save all the same


def cancelled_while_saving(bench, nodes, members):
    runs, jobs = bench.submit({"steps": 300, "save_seconds": 2}, nodes=nodes, members=members)
    run, job = runs[-1], jobs[-1]
    bench.at_step(run, 6)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    time.sleep(1)
    cancel(run, Queue(bench.slurm))
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"]) == ("cancel", "cancelled")
    assert bench.gone(job) == "CANCELLED"
    assert bench.state(run).name == "CANCELLED"


def cancelled_while_pending(bench, nodes, members):
    runs, jobs = bench.submit({"steps": 300}, nodes=nodes, members=members)
    run, job = runs[-1], jobs[-1]
    bench.at_step(run, 3)
    sandboxes.preempt(bench.sandbox.folder, job, come_back=False)
    assert bench.state(run).name == "PENDING"
    assert "requeued" in bench.state(run).detail
    cancel(run, Queue(bench.slurm))
    assert bench.gone(job) == "CANCELLED"
    assert bench.state(run).name == "CANCELLED"
    assert len(run.attempts()) == 1


def requeued_already(bench, nodes, members):
    runs, jobs = bench.submit({"steps": 30}, nodes=nodes, members=members)
    run, job = runs[-1], jobs[-1]
    bench.at_step(run, 6)
    subprocess.run(["scontrol", "requeue", job], check=True)
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"], verdict["counts"]) == ("note", "requeued already", False)
    bench.come_back(job)
    finished(bench, run, job, 2, 30, nodes)


def superseded(bench, nodes, members):
    runs, jobs = bench.submit({"steps": 300}, nodes=nodes, members=members)
    run, job = runs[-1], jobs[-1]
    bench.at_step(run, 4)
    run.settings_file.touch()
    run.claim("local-elsewhere-1-1", host="elsewhere", still_running=lambda job: False)
    before = {path: path.stat().st_size for path in (run.attempts_dir / "1").iterdir()}
    assert bench.gone(job) == "FAILED"
    assert bench.slurm.job(job).exit_code == 88
    assert history.last_verdict(run.attempt(1)) is None
    assert run.cancelled_jobs() == set()
    after = {path: path.stat().st_size for path in (run.attempts_dir / "1").iterdir()}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {f"rank-{rank}.out" for rank in range(2 * nodes)}  # their logs, in which they say why


def never_started(bench, nodes, members, tmp_path_factory):
    broken = tmp_path_factory.mktemp("broken") / "code"
    subprocess.run(["cp", "-r", bench.code, broken], check=True)
    (broken / "jobs" / "train.py").write_text("import no_such_module_anywhere\n")
    runs, jobs = bench.submit({}, nodes=nodes, members=members, code=broken)
    run, job = runs[-1], jobs[-1]
    first = bench.verdict(run, 1)
    assert (first["event"], first["ending"]) == ("requeue", "never started")
    bench.come_back(job)
    second = bench.verdict(run, 2)
    assert (second["event"], second["ending"], second["code"]) == ("fail", "never started", 1)
    assert "no_such_module_anywhere" in second["reason"]
    assert "blamed" not in first
    assert "blamed" not in second
    assert bench.gone(job) == "FAILED"
    assert bench.slurm.job(job).excluded == ()


SCENARIOS = [
    preempted,
    crashed,
    failed,
    stopped,
    scancelled,
    cancelled_while_saving,
    cancelled_while_pending,
    requeued_already,
    superseded,
]


@pytest.mark.parametrize(
    ("scenario", "nodes", "members"),
    [
        (preempted, 2, 1),
        (crashed, 1, 2),
        (failed, 2, 1),
        (stopped, 1, 1),
        (scancelled, 1, 1),
        (cancelled_while_saving, 1, 1),
        (cancelled_while_pending, 1, 2),
        (requeued_already, 1, 1),
        (superseded, 1, 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_ending(bench, scenario, nodes, members):
    scenario(bench, nodes, members)


@pytest.mark.long
@pytest.mark.parametrize("sandbox", [False, True], indirect=True, ids=["TERM", "USR2"])
@pytest.mark.parametrize("members", [1, 2], ids=["single", "array"])
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_matrix(bench, scenario, nodes, members):
    scenario(bench, nodes, members)


def test_a_snapshot_that_cannot_start(bench, tmp_path_factory):
    never_started(bench, 1, 1, tmp_path_factory)
