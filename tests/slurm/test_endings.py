"""Endings on a real SLURM cluster: the real TrainJob, batch script and verdict, a trainee without torch."""

from __future__ import annotations

import subprocess
import time

import pytest

from clipcluster.runs.checkpoints import newest_complete
from jobs.cancel import cancel
from jobs.endings import history
from jobs.state import Queue
from tools.sandbox.preempt import preempt

pytestmark = pytest.mark.slurm
# Each scenario is one line of the table. They run on one job or on a member of an array (the others must
# not notice), on one node or two, on sites that send USR2 at a preemption and on those that do not.


def preempted(bench, nodes):
    run, job = bench.submit({"steps": 40}, nodes=nodes)
    bench.at_step(run, 7)
    done = preempt(bench.sandbox.folder, job, come_back=False)
    assert done.requeued
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"], verdict["counts"]) == ("requeue", "preempted", False)
    saved = run.attempt(1).outcome()
    assert saved["outcome"] == "stopped"
    assert verdict["checkpoint"] == saved["step"] >= 7
    assert done.evicted_after < bench.sandbox.grace_seconds
    bench.come_back(job)
    bench.finished(run, job, 2, 40, nodes)
    assert newest_complete(run.checkpoints) == 40


def crashed(bench, nodes):
    last = 2 * nodes - 1
    run, job = bench.submit({"steps": 15, "crash": {"step": 8, "rank": last, "attempts": [1]}}, nodes=nodes)
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"], verdict["counts"]) == ("requeue", "crashed", True)
    assert verdict["checkpoint"] == 5
    assert verdict["blamed"] in bench.sandbox.nodes
    bench.come_back(job)
    bench.finished(run, job, 2, 15, nodes)


def failed(bench, nodes):
    run, job = bench.submit(
        {"steps": 15, "raises": {"step": 3, "rank": 1, "error": "DataError"}}, nodes=nodes
    )
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"], verdict["code"]) == ("fail", "failed", 90)
    assert "shard 00003.tar changed (rank 1 on" in verdict["reason"]
    assert verdict["advice"]
    assert bench.gone(job) == "FAILED"
    assert len(run.attempts()) == 1
    assert bench.state(run).name == "FAILED"


def stopped(bench, nodes):
    run, job = bench.submit({"steps": 30}, nodes=nodes)
    bench.at_step(run, 6)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"], verdict["counts"]) == ("requeue", "stopped", False)
    bench.come_back(job)
    bench.finished(run, job, 2, 30, nodes)


def scancelled(bench, nodes):
    run, job = bench.submit({"steps": 300}, nodes=nodes)
    bench.at_step(run, 6)
    subprocess.run(["scancel", job], check=True)
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"], verdict["code"]) == ("cancel", "cancelled", 130)
    assert run.cancelled_jobs() == {job}
    assert bench.gone(job) == "CANCELLED"
    assert bench.state(run).name == "CANCELLED"
    assert run.attempt(1).outcome()["outcome"] == "stopped"  # the ranks had time to save all the same


def cancelled_while_saving(bench, nodes):
    run, job = bench.submit({"steps": 300, "save_seconds": 2}, nodes=nodes)
    bench.at_step(run, 6)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    time.sleep(1)
    cancel(run, Queue(bench.slurm))
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"]) == ("cancel", "cancelled")
    assert bench.gone(job) == "CANCELLED"
    assert bench.state(run).name == "CANCELLED"


def cancelled_while_pending(bench, nodes):
    run, job = bench.submit({"steps": 300}, nodes=nodes)
    bench.at_step(run, 3)
    preempt(bench.sandbox.folder, job, come_back=False)
    assert bench.state(run).name == "PENDING"
    assert "requeued" in bench.state(run).detail
    cancel(run, Queue(bench.slurm))
    assert bench.gone(job) == "CANCELLED"
    assert bench.state(run).name == "CANCELLED"
    assert len(run.attempts()) == 1


def requeued_already(bench, nodes):
    run, job = bench.submit({"steps": 30}, nodes=nodes)
    bench.at_step(run, 6)
    subprocess.run(["scontrol", "requeue", job], check=True)
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"], verdict["counts"]) == ("note", "requeued already", False)
    bench.come_back(job)
    bench.finished(run, job, 2, 30, nodes)


def superseded(bench, nodes):
    run, job = bench.submit({"steps": 300}, nodes=nodes)
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


def never_started(bench, nodes):
    broken = bench.folder / "broken"
    subprocess.run(["cp", "-r", bench.code, broken], check=True)
    (broken / "jobs" / "train.py").write_text("import no_such_module_anywhere\n")
    run, job = bench.submit({}, nodes=nodes, code=broken)
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
    never_started,
]


@pytest.mark.parametrize(
    ("scenario", "nodes"),
    [
        (preempted, 2),
        (crashed, 1),
        (failed, 2),
        (stopped, 1),
        (scancelled, 1),
        (cancelled_while_saving, 1),
        (cancelled_while_pending, 1),
        (requeued_already, 1),
        (superseded, 1),
        (never_started, 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_ending(bench, scenario, nodes):
    scenario(bench, nodes)


@pytest.mark.long
@pytest.mark.parametrize("sandbox", [False, True], indirect=True, ids=["TERM", "USR2"])
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_matrix(bench, scenario, nodes):
    scenario(bench, nodes)
