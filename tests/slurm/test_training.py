"""Real training on a real cluster, through real preemptions and kills: it equals the uninterrupted run.

Two nodes x two ranks over gloo train the small towers of the digits recipe. Compared are the keys of all
samples in the order in which they were consumed, and the losses of all steps, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from clipcluster.runs.folder import Run
from clipcluster.runs.merge import events, lines, merged_metrics
from clipcluster.runs.names import all_runs
from jobs.cancel import cancel
from jobs.state import Queue, State, state_of
from tests.consumed import merged_samples
from tests.ranks import kill_rank
from tools.convert.convert import convert
from tools.sandbox import sandbox as sandboxes
from tools.sandbox.preempt import preempt, release

ROOT = Path(__file__).resolve().parents[2]
SHORT, LENGTHY = 33, 400  # steps; an epoch has 22, and a lost node is noticed after some 25 s
ELASTIC = 90
SECONDS = 240

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "digits"
    convert("digits", folder)
    return folder


class Site:
    """The sandbox with the digits beside it: submits runs, watches them, and knows the uninterrupted ones."""

    def __init__(self, sandbox, digits: Path, room: Path) -> None:
        self.sandbox, self.digits, self.room = sandbox, digits, room
        self.runs: list[Run] = []
        self.references: dict[int, tuple[list, dict]] = {}

    def submit(self, steps: int, *overrides: str) -> Run:
        """The digits recipe on 2 nodes x 2 ranks, unless told otherwise."""
        runs = self.room / f"runs-{len(self.runs)}"
        self.runs.append(self._submit(runs, steps, overrides))
        return self.runs[-1]

    def _submit(self, runs: Path, steps: int, overrides: tuple[str, ...]) -> Run:
        command = [
            *(sys.executable, "-m", "jobs.cli", "submit", str(ROOT / "recipes/digits.yaml")),
            *("--executor", "slurm", "--quick", "--runs", str(runs)),
            *("cluster.partition=low", "cluster.nodes=2", "cluster.tasks_per_node=2", "cluster.time=15 min"),
            *(f"train.duration={steps} steps", "train.log_every=1 steps", "train.record_samples=true"),
            *("checkpoint.every=8 steps", "evaluate.every=null", "data.workers=1"),
            *overrides,
        ]
        environment = {**os.environ, **self.sandbox.environment, "DIGITS": str(self.digits)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        (run,) = all_runs(runs)
        return run

    def resubmit(self, run: Run, steps: int, *overrides: str) -> None:
        assert self._submit(run.path.parent, steps, overrides).path == run.path

    def job(self, run: Run):
        newest = run.newest()
        return self.sandbox.slurm.job(newest.job) if newest and newest.job else None

    def wait_for_end(self, run: Run) -> None:
        """Wait for the end, letting every requeued attempt start at once."""

        def ended() -> bool:
            job = self.job(run)
            if job is not None and job.state == "PENDING":
                release(self.sandbox.folder, job.job_id)
            return run.finished()

        wait_until(ended, run, "the end")

    def uninterrupted(self, steps: int) -> tuple[list, dict]:
        """Keys and losses of a run of so many steps that nothing disturbs."""
        if steps not in self.references:
            run = self.submit(steps)
            self.wait_for_end(run)
            assert len(run.attempts()) == 1
            assert len(consumed(run)) == steps * 64
            assert sorted(losses(run)) == list(range(1, steps + 1))
            self.references[steps] = consumed(run), losses(run)
        return self.references[steps]

    def assert_as_uninterrupted(self, run: Run, steps: int) -> None:
        keys, table = self.uninterrupted(steps)
        assert consumed(run) == keys
        assert losses(run) == table
        finished = lambda: state_of(run, Queue(self.sandbox.slurm)).name == "FINISHED"  # noqa: E731
        wait_until(finished, run, "the status FINISHED", 30)


@pytest.fixture(scope="module")
def site(sandbox, digits, tmp_path_factory):
    site = Site(sandbox, digits, tmp_path_factory.mktemp("runs"))
    yield site
    left = [run.newest().job for run in site.runs if run.newest() and not run.finished()]
    sandbox.slurm.cancel([job for job in left if job])


def wait_until(true, run: Run, what: str, seconds: float = SECONDS) -> None:
    """Wait; the test fails after `seconds` in which the run wrote no step."""
    begin = time.time()
    while not true():
        written = [path.stat().st_mtime for path in run.path.glob("attempts/*/metrics.jsonl")]
        if time.time() > max([begin, *written]) + seconds:
            logs = "\n".join(
                f"== {path}\n{path.read_text(errors='replace')[-2000:]}"
                for path in [*run.path.glob("attempts/*/rank-0.out"), *run.submitit.glob("*_0_log.err")]
            )
            pytest.fail(f"{run.name}: {what} did not come, and no step for {seconds:g} s\n{logs}")
        time.sleep(0.05)


def wait_for_step(run: Run, step: int) -> None:
    wait_until(lambda: max(losses(run), default=0) >= step, run, f"step {step}")


def consumed(run: Run) -> list[tuple[int, int, str, str]]:
    return [(line["step"], line["slot"], line["shard"], line["key"]) for line in merged_samples(run)]


def losses(run: Run) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in merged_metrics(run) if "loss" in line}


def of_kind(run: Run, kind: str) -> list[dict]:
    return [line for line in events(run) if line["event"] == kind]


def codes_of_old_ranks(run: Run) -> list[int]:
    """The codes with which the four ranks of the first attempt left, as they wrote them down."""
    failed = {line["rank"]: line["code"] for line in ranked(run, "fail")}
    stopped = [rank for rank in range(4) if "stopped at step" in rank_log(run, rank)]
    return [failed.get(rank, 85 if rank in stopped else 1) for rank in range(4)]


def ranked(run: Run, kind: str) -> list[dict]:
    """Events of the first attempt's ranks, with the rank that wrote each."""
    files = run.attempt(1).path.glob("events-rank-*.jsonl")
    written = [
        {**json.loads(line), "rank": int(path.stem.rpartition("-")[2])}
        for path in files
        for line in path.read_text().splitlines()
    ]
    return [line for line in written if line["event"] == kind]


def rank_log(run: Run, rank: int) -> str:
    return (run.attempt(1).path / f"rank-{rank}.out").read_text(errors="replace")


def test_preempted_mid_epoch(site):
    run = site.submit(SHORT)
    wait_for_step(run, 15)
    told = time.time()
    preemption = preempt(site.sandbox.folder, run.path)
    assert preemption.requeued
    saved = of_kind(run, "checkpoint")[-1]
    assert saved["time"] - told < 10, "saved within the grace time"
    assert told + preemption.evicted_after - saved["time"] < 5, "the nodes are free within 5 s of the save"
    site.wait_for_end(run)
    assert len(run.attempts()) == 2
    (resumed,) = of_kind(run, "resume")
    assert resumed["step"] == saved["step"]
    assert resumed["step"] % 22, "in the middle of an epoch"
    site.assert_as_uninterrupted(run, SHORT)


@pytest.mark.long
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(site):
    run = site.submit(SHORT)
    wait_for_step(run, 12)
    assert kill_rank(run.newest(), rank=3)
    site.wait_for_end(run)
    assert len(run.attempts()) == 2
    (resumed,) = of_kind(run, "resume")
    assert resumed["step"] in (8, 16, 24)
    site.assert_as_uninterrupted(run, SHORT)


@pytest.mark.long
def test_a_preemption_loses_no_step_and_the_nodes_are_free_in_time(site, preempt_and_watch):
    """From the signal to free nodes: one step, the save, and 3 s at most."""
    run = site.submit(SHORT)
    wait_for_step(run, 15)
    preemption, seconds = preempt_and_watch(run.newest().job)
    assert preemption.requeued
    saved = of_kind(run, "checkpoint")[-1]
    times = [line["time"] for line in merged_metrics(run)]
    step = max(later - earlier for earlier, later in pairwise(times))
    print(f"{seconds:.2f} s to free nodes; longest step {step:.2f} s, save {saved['seconds']:.2f} s")
    assert seconds <= step + saved["seconds"] + 3.0
    assert saved["step"] == len(times) == max(losses(run))
    site.wait_for_end(run)
    assert [event["step"] for event in of_kind(run, "resume")] == [saved["step"]]
    made = [line["step"] for line in lines(run, "metrics.jsonl")]
    assert made == [*range(1, SHORT + 1), SHORT], "a line for each step, and one with the last evaluation"
    site.assert_as_uninterrupted(run, SHORT)


@pytest.mark.long
def test_errors_of_data_and_recipe_end_with_advice_that_works(site, tmp_path):
    def failed(run: Run) -> State:
        wait_until(lambda: state_of(run, Queue(site.sandbox.slurm)).name == "FAILED", run, "its failure")
        return state_of(run, Queue(site.sandbox.slurm))

    folder = tmp_path / "digits"
    shutil.copytree(site.digits, folder)
    shards = (f"data.train.0.shards={folder}/train", "optim.warmup=2 steps")
    run = site.submit(8, *shards, f'cluster.setup=["mv {folder}/train {folder}/away"]')
    state = failed(run)
    assert state.code == 89
    assert str(folder / "train") in state.detail
    assert state.advice
    (folder / "away").rename(folder / "train")
    wait_until(lambda: not state_of(run, Queue(site.sandbox.slurm)).queued, run, "the end of its job")
    site.resubmit(run, 8, *shards)
    site.wait_for_end(run)
    assert sorted(losses(run)) == list(range(1, 9))

    wrong = "freeze=[{tower: image, trainable: last 99, at: 1 epochs}]"  # what the plain check cannot know
    state = failed(site.submit(SHORT, wrong))
    assert state.code == 89
    assert "the image tower has" in state.detail
    assert "clipcluster check RECIPE --deep" in state.advice
    command = [sys.executable, "-m", "jobs.cli", "check", str(ROOT / "recipes/digits.yaml"), wrong, "--deep"]
    environment = {**os.environ, "DIGITS": str(site.digits)}
    checked = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert checked.returncode == 2
    assert "the image tower has" in checked.stderr + checked.stdout


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_preempted_at_random_moments_onto_other_numbers_of_workers(site, seed):
    moments = random.Random(seed)
    run = site.submit(LENGTHY)
    for workers in (2, 0, 1):
        at_least = max(losses(run), default=0) + moments.randrange(1, LENGTHY // 5)
        wait_for_step(run, at_least)
        time.sleep(moments.random())
        run.update_settings(with_workers(run.settings(), workers))  # in force from the next attempt on
        assert preempt(site.sandbox.folder, run.path).requeued
    site.wait_for_end(run)
    in_force = [attempt.settings()["data"]["workers"] for attempt in run.attempts()]
    assert in_force == [1, 2, 0, 1]
    site.assert_as_uninterrupted(run, LENGTHY)


def with_workers(settings: dict, workers: int) -> dict:
    """The settings as a submission with another number of loader workers writes them."""
    return {**settings, "data": {**settings["data"], "workers": workers}}


@pytest.mark.long
def test_a_killed_node(site):
    run = site.submit(LENGTHY)
    wait_for_step(run, 20)
    node = site.job(run).nodes[1]
    sandboxes.kill_node(site.sandbox.folder, node)
    try:
        site.wait_for_end(run)
    finally:
        sandboxes.restore_node(site.sandbox.folder, node)
    assert len(run.attempts()) >= 2
    site.assert_as_uninterrupted(run, LENGTHY)


@pytest.mark.long
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_lost_node(site, nodes):
    """SLURM gives the run to another node while the old ranks of the lost one go on."""
    run = site.submit(LENGTHY, f"cluster.nodes={nodes}", f"cluster.tasks_per_node={4 // nodes}")
    wait_for_step(run, 10)
    node = site.job(run).nodes[-1]
    sandboxes.lose_node(site.sandbox.folder, node)
    try:
        site.wait_for_end(run)
    finally:
        sandboxes.restore_node(site.sandbox.folder, node)
    if nodes == 2:  # the batch script lives, and so does its half of the ranks
        assert set(codes_of_old_ranks(run)) <= {85, 87}
        asked = min(line["time"] for line in of_kind(run, "stop_requested") if line["attempt"] == 1)
        last = max(path.stat().st_mtime for path in run.attempt(1).path.glob("rank-*.out"))
        assert last - asked < site.sandbox.grace_seconds
    claimed = run.attempt(2).claim()["time"]
    late = [line for line in events(run) if line["attempt"] == 1 and line["time"] > claimed + 1]
    assert late == []
    site.assert_as_uninterrupted(run, LENGTHY)


@pytest.mark.long
def test_on_four_ranks_then_two_then_four(site):
    """Cancelled and submitted again with another number of nodes: the same batches, the same losses to 1e-5.

    The towers have layer norms alone and no dropout, and compute in float32.
    """
    run = site.submit(ELASTIC)
    for nodes in (1, 2):
        wait_for_step(run, max(losses(run), default=0) + 10)
        cancel(run, Queue(site.sandbox.slurm))
        wait_until(lambda: not state_of(run, Queue(site.sandbox.slurm)).queued, run, "the end of its job")
        site.resubmit(run, ELASTIC, f"cluster.nodes={nodes}")
    site.wait_for_end(run)
    assert [len(list(attempt.path.glob("rank-*.out"))) for attempt in run.attempts()] == [4, 2, 4]
    assert [line["step"] for line in of_kind(run, "resume")] == sorted(
        attempt.outcome()["step"] for attempt in run.attempts()[:2]
    ), "no step was done twice"
    keys, table = site.uninterrupted(ELASTIC)
    assert consumed(run) == keys
    assert losses(run) == pytest.approx(table, rel=1e-5)
