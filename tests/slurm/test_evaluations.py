"""Evaluations as jobs of their own on a real cluster, while the training goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipcluster.runs.checkpoints import steps_in
from clipcluster.runs.evaluations import failed_of, owed_by
from clipcluster.runs.files import read_json
from clipcluster.runs.merge import merged_metrics
from clipcluster.runs.names import all_runs
from jobs.cancel import cancel
from jobs.endings import history
from jobs.state import Queue, state_of
from jobs.submit.submit import Wanted, submit
from tools.convert.convert import convert
from tools.sandbox.preempt import preempt, release

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "digits.yaml"


@pytest.fixture
def digits(tmp_path, monkeypatch):
    convert("digits", tmp_path / "digits")
    monkeypatch.setenv("DIGITS", str(tmp_path / "digits"))
    return tmp_path / "digits"


@pytest.fixture
def ask(bench, digits, tmp_path):
    """Submits the demo's recipe with trainees without torch; evaluations are jobs, owed at every save."""

    def ask(*overrides, **orders):
        wanted = Wanted(
            recipe=RECIPE,
            overrides=[
                *("cluster.partition=low", "cluster.tasks_per_node=2", "data.batch_size=128"),
                *("evaluate.where=job", f"cluster.environment.TRAINEE='{json.dumps(orders)}'"),
                *overrides,
            ],
            runs=tmp_path / "runs",
            trainee="trainee:train",
            evaluator="trainee:evaluate",
            quick=True,
            say=lambda text: None,
        )
        submitted = submit(wanted)
        if submitted.job:
            bench.jobs.append(submitted.job)
        return submitted.run

    return ask


def jobs_of(run, bench):
    """The evaluations of a run with the job of each; the jobs end with the test."""
    found = {owed: owed.job.newest().job for owed in owed_by(run) if owed.job.newest()}
    bench.jobs.extend(found.values())
    return found


def evaluated(run):
    return {line["step"] for line in merged_metrics(run) if "val/t2i_r1" in line}


def test_interrupted_ones_are_repeated_while_the_training_goes_on(ask, bench):
    run = ask(steps=160, seconds=0.1, save_every=80, evaluation={"seconds": 3})
    found = bench.until(lambda: jobs_of(run, bench))
    (owed,) = found
    assert bench.slurm.job(found[owed]).state == "RUNNING"
    assert state_of(run, Queue()).name == "RUNNING"
    bench.slurm.requeue(found[owed])  # in the middle
    bench.come_back(found[owed])
    bench.until(lambda: run.finished())
    bench.until(lambda: evaluated(run) == {80, 160} and not jobs_of(run, bench))
    assert len(owed.job.attempts()) == 2
    assert len(read_json(owed.run.evals / "step-00000080.json")["job"]) > 0
    assert [owed.step for owed in (*owed_by(run), *failed_of(run))] == []


def test_they_survive_the_preemption_of_either_job_and_end_with_cancel(ask, bench, sandbox):
    run = ask(steps=400, seconds=0.1, save_every=50, evaluation={"seconds": 5})
    owed, job = next(iter(bench.until(lambda: jobs_of(run, bench)).items()))
    assert preempt(sandbox.folder, owed.job.path).requeued
    assert history.last_verdict(owed.job.attempt(1))["ending"] == "preempted"
    bench.until(lambda: owed.step in evaluated(run))
    assert state_of(run, Queue()).name == "RUNNING"
    assert len(run.attempts()) == 1 or history.last_verdict(run.attempt(1))["ending"] == "preempted"

    other, job = next(iter(bench.until(lambda: jobs_of(run, bench)).items()))
    assert preempt(sandbox.folder, run.path).requeued
    bench.until(lambda: other.step in evaluated(run), 120)
    steps = {owed.step for owed in owed_by(run)} | evaluated(run)
    bench.until(lambda: (steps | {max(steps) + 50}) <= evaluated(run), 120)

    running = bench.until(lambda: jobs_of(run, bench))
    cancel(run, Queue())
    for owed, job in running.items():
        assert bench.gone(job) == "CANCELLED"
        assert state_of(owed.job, Queue()).name == "CANCELLED"
    assert owed_by(run) == []


def test_a_real_training_equals_the_one_that_evaluates_itself(bench, digits, sandbox, tmp_path):
    """The pinned checkpoint outlives the rotation; a preempted evaluation is repeated; equal figures."""
    every = ["train.duration=120 steps", "evaluate.every=20 steps", "checkpoint.every=4 steps"]
    every += ["checkpoint.keep={last: 2, best: {metric: test/t2i_r1}}", "train.log_every=1 steps"]
    every += ["cluster.tasks_per_node=2", "data.workers=0", "cluster.partition=low"]
    inside = real(sandbox, tmp_path / "inside", *every)
    bench.until(inside.finished, 400)
    run = real(sandbox, tmp_path / "beside", *every, "evaluate.where=job", "evaluate.cluster.time=10 min")
    first, job = next(iter(bench.until(lambda: jobs_of(run, bench), 400).items()))
    assert (first.step, bench.slurm.job(job).state) == (20, "RUNNING")
    assert preempt(sandbox.folder, first.job.path, come_back=False).requeued

    def step():
        return max((line["step"] for line in merged_metrics(run)), default=0)

    bench.until(lambda: let_go(run, sandbox) and step() >= 36, 400)  # four saves later, with keep.last 2
    assert 20 in steps_in(run.checkpoints)
    assert not (run.evals / "step-00000020.json").exists()
    release(sandbox.folder, job)
    bench.until(lambda: run.finished(), 400)
    bench.until(lambda: not jobs_of(run, bench) and not owed_by(run), 400)

    assert len(first.job.attempts()) >= 2
    assert failed_of(run) == []
    names = [f"step-{at:08d}.json" for at in range(20, 121, 20)]
    assert sorted(path.name for path in run.evals.glob("step-*")) == names
    for name in names:
        own, other = (read_json(one.evals / name)["metrics"] for one in (run, inside))
        assert own.keys() == other.keys()
        assert own == pytest.approx(other, abs=1e-6)  # one rank here, two there
    measured = {line["step"]: line["test/t2i_r1"] for line in merged_metrics(run) if "test/t2i_r1" in line}
    best = max(measured, key=lambda step: (measured[step], -step))
    bench.until(lambda: steps_in(run.checkpoints) == sorted({best, 116, 120}))


def let_go(run, sandbox):
    """Let the training start again at once where it shared the node of a preempted evaluation."""
    newest = run.newest()
    job = sandbox.slurm.job(newest.job) if newest else None
    if job is not None and job.state == "PENDING":
        release(sandbox.folder, job.job_id)
    return True


def real(sandbox, runs, *overrides):
    """A run of the demo's recipe, submitted by the command."""
    command = [sys.executable, "-m", "jobs.cli", "submit", str(RECIPE), "--executor", "slurm", "--quick"]
    environment = {**os.environ, **sandbox.environment}
    done = subprocess.run(
        [*command, "--runs", str(runs), *overrides], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = all_runs(runs)
    return run
