"""Endings at a site that is set up otherwise; one sandbox serves all of them.

JobRequeue=0, enforced memory limits, no grace time, nodes without scontrol, fewer nodes than asked for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from clipcluster.recipe.load import load
from clipcluster.recipe.plan import usable_nodes
from clipcluster.runs.checkpoints import newest_complete
from jobs.endings import history
from tools.sandbox.preempt import preempt
from tools.slurm import SlurmRefused

STRICT = (
    ("JobRequeue=1", "JobRequeue=0"),
    (
        "JobAcctGatherType=jobacct_gather/none",
        "JobAcctGatherType=jobacct_gather/linux\nJobAcctGatherFrequency=task=1\n"
        "JobAcctGatherParams=OverMemoryKill",
    ),
    ("DefMemPerCPU=100", "DefMemPerCPU=500"),
)
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.long,
    pytest.mark.parametrize("sandbox", [STRICT], indirect=True, ids=["strict"]),
]
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def grace_time(sandbox, seconds):
    """Another GraceTime of the partition low."""

    def update(value):
        subprocess.run(
            ["scontrol", "update", "PartitionName=low", f"GraceTime={value}"],
            check=True,
            env={**os.environ, **sandbox.environment},
        )

    update(seconds)
    try:
        yield
    finally:
        update(sandbox.grace_seconds)


def test_crashed_and_preempted_where_only_jobs_that_ask_for_it_are_requeued(bench):
    plain = bench.slurm.submit("--output=/dev/null", "--wrap=sleep 60")
    bench.jobs.append(plain)
    with pytest.raises(SlurmRefused):
        bench.slurm.requeue(plain)
    run, job = bench.submit({"steps": 25, "crash": {"step": 3, "rank": 0, "attempts": [1]}})
    assert bench.verdict(run, 1)["ending"] == "crashed"
    bench.come_back(job)
    bench.at_step(run, 7, attempt=2)
    assert preempt(bench.sandbox.folder, job, come_back=False).requeued
    assert bench.verdict(run, 2)["ending"] == "preempted"
    bench.come_back(job)
    bench.finished(run, job, 3, 25, 1)


def test_what_slurm_kills_for_its_memory_ends_with_advice_that_works(bench):
    orders = {"steps": 9, "save_every": 2, "eats": {"step": 5, "rank": 1, "megabytes": 1500}}
    run, job = bench.submit(orders, mem="700 MB")
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"], verdict["code"]) == ("fail", "out of memory", 91)
    assert "memory" in verdict["reason"].lower()
    assert "blamed" not in verdict
    bench.gone(job)
    state = bench.state(run)
    assert (state.name, state.code) == ("FAILED", 91)
    assert "cluster.mem" in state.advice
    assert len(run.attempts()) == 1
    again = bench.submit_again(run, orders, mem="3 GB")
    bench.finished(run, again, 2, 9, 1)


def test_what_ranks_raise_ends_with_advice_and_the_run_resumes_once_it_is_followed(bench):
    expected = {"OutOfMemory": 91, "MemoryError": 91, "RecipeFailure": 89}
    raising = {
        error: bench.submit({"steps": 6, "save_every": 2, "raises": {"step": 3, "rank": 1, "error": error}})
        for error in expected
    }
    for error, (run, job) in raising.items():
        verdict = bench.verdict(run, 1)
        assert (verdict["event"], verdict["ending"]) == ("fail", "failed")
        assert verdict["code"] == expected[error]
        assert "(rank 1 on" in verdict["reason"]
        assert verdict["advice"]
        assert bench.gone(job) == "FAILED"
        assert bench.slurm.job(job).exit_code == expected[error]
        assert bench.state(run).name == "FAILED"
    again = {error: bench.submit_again(run, {"steps": 6}) for error, (run, _) in raising.items()}
    for error, (run, _) in raising.items():
        bench.finished(run, again[error], 2, 6, 1)


@pytest.mark.parametrize("nodes", [1, 2])
def test_preempted_without_a_grace_time(bench, nodes):
    """SLURM has requeued the job already when the ranks hear of it: periodic saves are what is left."""
    with grace_time(bench.sandbox, 0):
        run, job = bench.submit({"steps": 40}, nodes=nodes)
        bench.at_step(run, 12)
        assert preempt(bench.sandbox.folder, job, come_back=False).requeued
        verdict = history.last_verdict(run.attempt(1))
        assert verdict is None or verdict["ending"] == "requeued already"
        assert newest_complete(run.checkpoints) >= 10
        bench.come_back(job)
        bench.finished(run, job, 2, 40, nodes)


def test_signals_that_come_again_while_it_saves(bench):
    run, job = bench.submit({"steps": 60, "save_seconds": 3}, nodes=2)
    bench.at_step(run, 6)
    preemption = threading.Thread(target=partial(preempt, bench.sandbox.folder, job, come_back=False))
    preemption.start()
    bench.until(lambda: bench.slurm.job(job).preempt_time)
    for signal in ("TERM", "USR2", "USR1", "TERM"):
        time.sleep(0.4)
        subprocess.run(["scancel", f"--signal={signal}", job], check=True)
    preemption.join()
    verdict = bench.verdict(run, 1)
    assert (verdict["ending"], verdict["counts"]) == ("preempted", False)
    assert run.attempt(1).outcome()["outcome"] == "stopped"
    assert verdict["checkpoint"] == run.attempt(1).outcome()["step"]
    bench.come_back(job)
    bench.finished(run, job, 2, 60, 2)


def without_scontrol(folder):
    """A line that leaves all programs on the PATH but scontrol."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in sorted(Path(place).iterdir()) if Path(place).is_dir() else []:
            link = folder / program.name
            if program.name != "scontrol" and not link.exists():
                link.symlink_to(program)
    return f"export PATH={folder}"


def impatient(bench, **seconds):
    """The code with other patience of a verdict that asks SLURM for a requeue."""
    folder = bench.folder / f"code-{time.monotonic_ns()}"
    shutil.copytree(bench.code, folder)
    for name, value in seconds.items():
        definition = re.compile(rf"^{name} = .*$", re.MULTILINE)
        (file,) = (one for one in folder.glob("jobs/endings/*.py") if definition.search(one.read_text()))
        file.write_text(definition.sub(f"{name} = {value}", file.read_text()))
    return folder


def test_without_scontrol_on_the_node(bench, tmp_path):
    line = without_scontrol(tmp_path / "bin")
    patient = impatient(bench, REFUSED_SECONDS=1.0)
    run, job = bench.submit({"steps": 40}, setup=[line], code=patient)
    bench.at_step(run, 6)
    with grace_time(bench.sandbox, 5):
        done = preempt(bench.sandbox.folder, job, come_back=False)
        assert done.requeued, "by SLURM, when the grace time ends"
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"], verdict["counts"]) == ("requeue", "stopped", False)
    assert run.attempt(1).outcome()["step"] == newest_complete(run.checkpoints)
    bench.come_back(job)
    bench.at_step(run, 20, attempt=2)
    subprocess.run(["scancel", job], check=True)
    assert bench.gone(job) == "CANCELLED"
    assert bench.state(run).name == "CANCELLED", "it does not rise again"

    crashing = {"steps": 12, "crash": {"step": 7, "rank": 1, "attempts": [1]}}
    short = impatient(bench, REFUSED_SECONDS=1.0, SILENT_SECONDS=2.0)
    run, job = bench.submit(crashing, setup=[line], code=short)
    assert bench.gone(job) == "FAILED"
    assert bench.slurm.job(job).exit_code == 85
    state = bench.state(run)
    assert (state.name, state.detail) == ("STOPPED", "SLURM refused to requeue the job")
    bench.finished(run, bench.submit_again(run, crashing), 2, 12, 1)


def test_of_two_to_four_nodes_three_are_granted_and_the_batch_divides_by_two(bench):
    wanted = ["cluster.nodes=2-4", "cluster.tasks_per_node=2", "data.batch_size=20"]
    used = partial(usable_nodes, load(ROOT / "recipes" / "digits.yaml", wanted).recipe)
    assert [used(granted) for granted in (2, 3, 4)] == [2, 2, 2]
    occupant = bench.slurm.submit(
        "--partition=high", "--exclusive", "--nodes=1", "--output=/dev/null", "--wrap=sleep 300"
    )
    bench.jobs.append(occupant)
    bench.until(lambda: bench.slurm.job(occupant).state == "RUNNING")
    run, job = bench.submit({"steps": 30}, nodes="2-4", used=used)
    bench.at_step(run, 5)
    assert len(bench.slurm.job(job).nodes) == 3
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    assert bench.verdict(run, 1)["ending"] == "stopped"
    bench.slurm.cancel([occupant])
    bench.gone(occupant)
    bench.come_back(job)
    bench.at_step(run, 25, attempt=2)
    assert len(bench.slurm.job(job).nodes) == 4
    bench.finished(run, job, 2, 30, 2)


def test_scancel_while_the_verdict_is_found(bench, tmp_path):
    (tmp_path / "bin").mkdir()
    slow = tmp_path / "bin" / "scontrol"
    slow.write_text(f'#!/bin/sh\n[ "$1" != show ] || sleep 2\nexec {shutil.which("scontrol")} "$@"\n')
    slow.chmod(0o755)
    line = f"export PATH={tmp_path / 'bin'}:$PATH"
    run, job = bench.submit({"crash": {"step": 2, "rank": 0}}, setup=[line])
    log = run.submitit / f"{job}_0_log.err"
    bench.until(lambda: log.exists() and "srun: error" in log.read_text())
    time.sleep(1.0)
    subprocess.run(["scancel", job], check=True)
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"]) == ("cancel", "cancelled")
    assert bench.gone(job) == "CANCELLED"
    assert run.cancelled_jobs() == {job}
