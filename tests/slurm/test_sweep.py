"""Sweeps on a real cluster: one array, members preempted, cancelled, resumed, and more of them later."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics
from clipcluster.runs.sweeps import membership
from jobs import api, logs
from jobs.state import Queue, state_of
from jobs.submissions import submissions
from tests.consumed import merged_samples
from tools.convert.convert import convert
from tools.sandbox.preempt import preempt

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 16


@pytest.fixture
def sweep(bench, tmp_path, monkeypatch):
    """The demo's recipe with a sweep in a file of its own: `sweep(section)` is the file."""
    convert("digits", tmp_path / "digits")
    monkeypatch.setenv("DIGITS", str(tmp_path / "digits"))

    def write(section):
        file = tmp_path / "many.yaml"
        file.write_text(f"extends: {ROOT}/recipes/digits.yaml\nname: many\nsweep: {section}\n")
        return file

    return write


@pytest.fixture
def submit(bench, tmp_path):
    """Submits with the torch-free trainee; a member takes a node for itself."""

    def submit(recipe, orders, *overrides, **more):
        given = {
            "cluster.partition": "low",
            "cluster.tasks_per_node": 1,
            "cluster.cpus_per_task": 3,
            "cluster.environment.TRAINEE": json.dumps(orders),
        }
        texts = [f"{key}={json.dumps(value)}" for key, value in given.items()]
        done = api.submit(
            recipe,
            [*texts, *overrides],
            runs=tmp_path / "runs",
            quick=True,
            trainee="trainee:train",
            **more,
        )
        bench.jobs += done.jobs.values()
        return done

    return submit


def let_all_end(bench, submitted, seconds=300):
    """Wait until no member is queued, letting every requeued one start at once."""

    def over():
        for job in bench.slurm.queue():
            if job.state == "PENDING" and job.reason == "BeginTime":
                bench.slurm.release(job.job_id)
        return all(state.ended and not state.queued for state in submitted.states(fresh=True))

    bench.until(over, seconds)


def running(bench, submitted):
    ids = {job.job_id for job in bench.slurm.queue() if job.state == "RUNNING"}
    return [run for run in submitted.runs if run.newest() and run.newest().job in ids]


def test_an_array_with_parallelism_whose_members_are_runs(bench, sweep, submit):
    recipe = sweep("{optim.lr: [1e-3, 2e-3], seed: [0, 1], parallel: 2}")
    done = submit(recipe, {"steps": 30, "seconds": 0.1})
    assert sorted(job.partition("_")[2] for job in done.jobs.values()) == ["0", "1", "2", "3"]
    assert len({job.partition("_")[0] for job in done.jobs.values()}) == 1
    bench.until(lambda: len(running(bench, done)) == 2)
    states = [job.state for job in bench.slurm.queue()]
    assert (states.count("RUNNING"), states.count("PENDING")) == (2, 2)
    assert done.state == "RUNNING"
    again = submit(recipe, {"steps": 30})
    assert [run.name for run in again.runs] == [run.name for run in done.runs]
    assert again.jobs == done.jobs
    more = submit(recipe, {"steps": 5}, "sweep.seed=[0, 1, 2]")  # two more, which wait for the four
    added = sorted(set(more.jobs.values()) - set(done.jobs.values()))
    assert len(added) == 2
    bench.until(lambda: {job.reason for job in bench.slurm.queue(job_ids=added)} == {"Dependency"})
    let_all_end(bench, done)
    assert done.state == "FINISHED"
    let_all_end(bench, more)
    assert more.state == "FINISHED"
    began = {run.name: run.attempt(1).claim()["time"] for run in more.runs}
    last = max(run.attempt(1).outcome()["time"] for run in done.runs)
    assert [began[run.name] > last for run in more.runs] == [run.name not in done.jobs for run in more.runs]
    for run in done.runs:
        assert len(run.attempts()) == 1
        assert run.newest().job == done.jobs[run.name]
        assert [line["step"] for line in merged_metrics(run)] == list(range(1, 31))
    assert {membership(run)["values"]["optim.lr"] for run in done.runs} == {1e-3, 2e-3}


def test_cancelled_and_resumed_as_one(bench, sweep, submit):
    recipe = sweep("{seed: [0, 1, 2], parallel: 1}")
    done = submit(recipe, {"steps": 40, "seconds": 0.1})
    first = bench.until(lambda: running(bench, done))[0]
    bench.at_step(first, 4)
    done.cancel()
    let_all_end(bench, done)
    assert done.state == "CANCELLED"
    assert [len(run.attempts()) for run in done.runs] == [1, 0, 0]
    assert all(submissions(run) for run in done.runs)
    more = submit(recipe, {"steps": 12, "seconds": 0.02}, "sweep.seed=[0, 1, 2, 3]")
    assert len(more.jobs) == 4
    alone = next(one for one in more.members if "seed=3" in one.name)
    bench.until(lambda: alone.states(fresh=True)[0].name == "PENDING")
    alone.cancel()
    let_all_end(bench, more)
    assert [state.name for state in more.states(fresh=True)] == ["FINISHED"] * 3 + ["CANCELLED"]
    assert len(first.attempts()) == 2
    assert more.state == "CANCELLED"


def test_people_requeue_a_member_and_end_an_array_with_slurms_own_commands(bench, sweep, submit):
    recipe = sweep("{seed: [0, 1, 2], parallel: 2}")
    done = submit(recipe, {"steps": 40, "seconds": 0.1})
    first, other = bench.until(lambda: len(found := running(bench, done)) == 2 and found)
    bench.at_step(first, 3)
    bench.at_step(other, 3)
    bench.slurm.requeue(first.newest().job)
    bench.verdict(first, 1)
    bench.come_back(done.jobs[first.name])
    bench.until(lambda: len(first.attempts()) == 2)
    assert len(other.attempts()) == 1
    bench.slurm.cancel([done.jobs[first.name].partition("_")[0]])
    let_all_end(bench, done)
    ends = {run.name: state.name for run, state in zip(done.runs, done.states(fresh=True), strict=True)}
    assert ends[first.name] == "CANCELLED"
    assert set(ends.values()) <= {"CANCELLED", "FINISHED"}, ends
    again = submit(recipe, {"steps": 12, "seconds": 0.02})
    let_all_end(bench, again)
    assert again.state == "FINISHED"


def test_members_that_ask_for_other_nodes_are_arrays_of_their_own(bench, sweep, submit):
    recipe = sweep("{seed: [0, 1], cluster.nodes: [1, 2]}")
    done = submit(recipe, {"steps": 4, "seconds": 0.05}, "data.batch_size=64")
    assert len({job.partition("_")[0] for job in done.jobs.values()}) == 2
    let_all_end(bench, done)
    assert done.state == "FINISHED"
    ranks = {run.name: len(list(run.attempt(1).path.glob("rank-*.out"))) for run in done.runs}
    assert ranks == {run.name: membership(run)["values"]["cluster.nodes"] for run in done.runs}


def test_the_log_of_a_member_that_never_started_is_found(bench, sweep, submit):
    done = submit(sweep("{seed: [0, 1]}"), {}, 'cluster.setup=["echo no such module >&2; exit 3"]')
    let_all_end(bench, done)
    for run in done.runs:
        assert any("no such module" in path.read_text() for path in logs.log_files(run))
    assert {state.name for state in done.states(fresh=True)} == {"LOST"}


SUBMIT = """
import sys
from jobs import api

recipe, runs, *overrides = sys.argv[1:]
api.submit(recipe, overrides, runs=runs, trainee="trainee:train", quick=True)
"""


def test_an_array_whose_submitter_died_is_found_again(bench, sweep, submit, tmp_path, monkeypatch):
    real, mark = shutil.which("sbatch"), tmp_path / "reached"
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    asks = f'[[ "$*" != *--test-only* ]] || exec {real} "$@"\n'  # when a job would start
    program.write_text(f'#!/bin/bash\n{asks}out=$({real} "$@"); touch {mark}; sleep 2; echo "$out"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(program.parent), os.environ["PATH"]]))
    recipe = sweep("{seed: [0, 1, 2]}")
    orders = json.dumps({"steps": 30, "seconds": 0.1})
    words = ["cluster.partition=low", "cluster.tasks_per_node=1", f"cluster.environment.TRAINEE='{orders}'"]
    command = [sys.executable, "-c", SUBMIT, str(recipe), str(tmp_path / "runs"), *words]
    submitter = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    bench.until(mark.exists)
    submitter.kill()
    submitter.wait()
    runs = api.submission("many", runs=tmp_path / "runs")
    assert {state_of(run, Queue()).name for run in runs.runs} <= {"PENDING", "RUNNING"}
    again = submit(recipe, {"steps": 30}, follow=True)
    assert len({job.partition("_")[0] for job in again.jobs.values()}) <= 1
    let_all_end(bench, runs)
    assert runs.state == "FINISHED"
    assert [len(run.attempts()) for run in runs.runs] == [1, 1, 1]


def consumed(run: Run) -> list[tuple[int, int, str, str]]:
    return [(line["step"], line["slot"], line["shard"], line["key"]) for line in merged_samples(run)]


def losses(run: Run) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in merged_metrics(run) if "loss" in line}


def test_preempted_members_equal_their_twins_and_added_values_alone_start(bench, sweep, tmp_path):
    section = "{optim.lr: [1e-3, 2e-3, 3e-3], seed: [0, 1], parallel: 2}"
    recipe = sweep(section)
    train = [
        *("cluster.partition=low", "cluster.tasks_per_node=1", "cluster.cpus_per_task=3"),
        *(f"train.duration={STEPS} steps", "train.log_every=1 steps", "train.record_samples=true"),
        *("checkpoint.every=6 steps", "evaluate.every=null", "data.workers=1", "optim.warmup=2 steps"),
    ]
    done = api.submit(recipe, train, runs=tmp_path / "runs", quick=True)
    bench.jobs += done.jobs.values()
    assert len(done.runs) == len(done.jobs) == 6
    chance = random.Random(0)
    chosen = {number: chance.randrange(2, STEPS - 6) for number in chance.sample(range(6), 3)}

    def preempted():
        for number, step in list(chosen.items()):
            if max(losses(done.runs[number]), default=0) >= step:
                assert preempt(bench.sandbox.folder, done.runs[number].path).requeued
                del chosen[number]
        return not chosen

    bench.until(preempted, 600)
    let_all_end(bench, done, 600)
    assert done.state == "FINISHED"
    assert sum(len(run.attempts()) for run in done.runs) == 9

    twins = api.submit(recipe, train, runs=tmp_path / "twins", quick=True)
    bench.jobs += twins.jobs.values()
    let_all_end(bench, twins, 600)
    for run, twin in zip(done.runs, twins.runs, strict=True):
        assert run.name == twin.name
        assert len(twin.attempts()) == 1
        assert len(consumed(twin)) == STEPS * 64
        assert consumed(run) == consumed(twin)
        assert losses(run) == losses(twin)
    assert len({tuple(losses(run).values()) for run in done.runs}) == 6

    more = api.submit(
        recipe, [*train, "sweep.optim.lr=[1e-3, 2e-3, 3e-3, 4e-3]"], runs=tmp_path / "runs", quick=True
    )
    bench.jobs += more.jobs.values()
    assert sorted(more.jobs) == sorted(run.name for run in more.runs if "lr=0.004" in run.name)
    assert len(more.jobs) == 2
    let_all_end(bench, more, 300)
    assert more.state == "FINISHED"
    assert [len(run.attempts()) for run in done.runs] == [len(run.attempts()) for run in more.runs[:6]]
    assert sum(len(run.attempts()) for run in more.runs) == 11
    best = more.best("loss")
    final = {run.name: losses(run)[STEPS] for run in more.runs}
    assert best.name == min(final, key=final.__getitem__)
