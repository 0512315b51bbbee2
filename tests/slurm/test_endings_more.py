"""Rarer endings on a real cluster: limits, nodes that die, a SLURM that refuses or keeps silent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest

from clipcluster.runs.checkpoints import newest_complete
from jobs.cancel import cancel
from jobs.endings import history
from jobs.state import Queue
from tools.sandbox import sandbox as sandboxes
from tools.sandbox.preempt import preempt

pytestmark = pytest.mark.slurm


def test_a_node_blamed_twice_is_excluded(bench):
    run, job = bench.submit(
        {"steps": 12, "save_every": 1, "crash": {"rank": 1, "at": [3, 6]}}, nodes=1, tasks=2
    )
    first = bench.verdict(run, 1)
    bench.come_back(job)
    second = bench.verdict(run, 2)
    assert [first["ending"], second["ending"]] == ["crashed", "crashed"]
    if first["blamed"] == second["blamed"]:
        bench.until(lambda: bench.slurm.job(job).excluded == (first["blamed"],))
    bench.come_back(job)
    bench.finished(run, job, 3, 12, 1)
    assert bench.slurm.job(job).nodes != (first["blamed"],)


@pytest.mark.long
def test_a_stopped_rank_is_requeued_and_its_node_is_blamed(bench):
    """Two of four ranks are on its node: SLURM kills them with it, and does not name them first."""
    run, job = bench.submit({"steps": 60, "save_every": 1, "stalled_after": 2.0}, nodes=2)
    bench.at_step(run, 12)
    ranks = {start["rank"]: start for start in map(run.attempt(1).start, range(4))}
    os.kill(ranks[2]["pid"], signal.SIGSTOP)
    verdict = bench.verdict(run, 1)
    assert (verdict["event"], verdict["ending"]) == ("requeue", "stalled")
    assert verdict["blamed"] == ranks[2]["node"]
    assert ranks[2]["node"] != ranks[0]["node"]
    assert f"process {ranks[2]['pid']} is stopped" in (run.attempt(1).path / "rank-3.out").read_text()
    bench.come_back(job)
    bench.finished(run, job, 2, 60, 2)


def test_a_crash_that_repeats_ends_the_run(bench):
    run, job = bench.submit({"crash": {"step": 2, "rank": 0}})
    for attempt in (1, 2):
        assert bench.verdict(run, attempt)["event"] == "requeue"
        bench.come_back(job)
    verdict = bench.verdict(run, 3)
    assert (verdict["event"], verdict["code"]) == ("fail", 1)
    assert "3 endings in a row" in verdict["reason"]
    assert bench.gone(job) == "FAILED"
    assert bench.state(run).name == "FAILED"


def test_preempted_while_importing(bench):
    run, job = bench.submit({"steps": 10, "imports": 4}, nodes=2)
    folder = run.attempts_dir / "1"
    bench.until(lambda: len(list(folder.glob("events-rank-*.jsonl"))) == 4)
    preempt(bench.sandbox.folder, job, come_back=False)
    assert bench.verdict(run, 1)["ending"] == "preempted"
    bench.come_back(job)
    bench.finished(run, job, 2, 10, 2)


def test_of_a_range_of_nodes_the_useful_ones_take_part(bench):
    run, job = bench.submit({"steps": 3}, nodes="2-3", used=lambda granted: {2: 2, 3: 2}[granted])
    assert bench.verdict(run, 1)["event"] == "finish"
    assert bench.gone(job) == "COMPLETED"
    bench.check_whole(run, 3, 4)


def test_submitting_while_the_old_job_still_ends(bench):
    """A second job leaves, naming the first, as long as that runs; once it was cancelled it goes on."""
    run, job = bench.submit({"steps": 400})
    bench.at_step(run, 3)
    other = bench.submit_again(run, {"steps": 12})
    assert bench.gone(other) == "FAILED"
    assert bench.slurm.job(other).exit_code == 88
    assert f"owned by job {job}" in (run.submitit / f"{other}_0_log.err").read_text()
    cancel(run, Queue(bench.slurm))
    assert bench.gone(job) == "CANCELLED"
    saved = newest_complete(run.checkpoints)
    assert saved < 400
    third = bench.submit_again(run, {"steps": saved + 3})
    bench.finished(run, third, 2, saved + 3, 1)


def test_another_number_of_nodes_goes_on(bench):
    run, job = bench.submit({"steps": 400}, nodes=2)
    bench.at_step(run, 3)
    cancel(run, Queue(bench.slurm))
    bench.gone(job)
    saved = newest_complete(run.checkpoints)
    other = bench.submit_again(run, {"steps": saved + 5}, nodes=1)
    assert bench.verdict(run, 2)["event"] == "finish"
    assert bench.gone(other) == "COMPLETED"


@pytest.mark.long
def test_the_lead_time_before_the_limit(bench):
    # a limit of two minutes: the signal comes 40 s before it, and up to a minute early
    run, job = bench.submit({"steps": 2000}, time="2 min")
    verdict = bench.verdict(run, 1, seconds=150)
    assert (verdict["event"], verdict["ending"], verdict["counts"]) == ("requeue", "stopped", True)
    bench.come_back(job)
    bench.at_step(run, verdict["checkpoint"] + 1, attempt=2)


@pytest.mark.long
@pytest.mark.parametrize("nodes", [1, 2])
def test_out_of_time(bench, nodes):
    orders = {"steps": 5000, "deaf": {"attempts": [1], "until": "SIGTERM"}}
    run, job = bench.submit(orders, nodes=nodes, time="1 min")
    verdict = bench.verdict(run, 1, seconds=180)
    assert (verdict["event"], verdict["ending"], verdict["counts"]) == ("requeue", "out of time", True)
    bench.come_back(job)
    bench.at_step(run, verdict["checkpoint"] + 1, attempt=2)


@pytest.mark.long
def test_ranks_that_outlive_the_limit_are_a_timeout(bench):
    """SLURM kills ranks and script in one moment: on a busy machine the verdict may come just before."""
    run, job = bench.submit({"steps": 5000, "deaf": {}}, time="1 min")
    newest = run.attempts_dir / "1"

    def ended():
        verdict = newest.exists() and history.last_verdict(run.attempt(1))
        return verdict or not bench.slurm.queue(job_ids=[job])

    verdict = bench.until(ended, 180)
    if verdict is True:
        assert bench.gone(job) == "TIMEOUT"
        assert bench.state(run).name == "TIMEOUT"
    else:
        assert (verdict["event"], verdict["ending"]) == ("requeue", "out of time")


@pytest.mark.long
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_node_dies(bench, nodes):
    """The node without the batch script where there are two, else the only one."""
    run, job = bench.submit({"steps": 600}, nodes=nodes)
    bench.at_step(run, 12)
    state = bench.slurm.job(job)
    victim = next((node for node in state.nodes if node != state.batch_host), state.batch_host)
    try:
        sandboxes.kill_node(bench.sandbox.folder, victim)
        bench.until(lambda: bench.slurm.job(job).restarts == 1, 90)
        bench.come_back(job)
        bench.until(lambda: (run.attempts_dir / "2" / "metrics.jsonl").exists(), 60)
        verdict = history.last_verdict(run.attempt(1))
        assert verdict is None or verdict["event"] in ("requeue", "note")
        assert newest_complete(run.checkpoints) >= 10
    finally:
        sandboxes.restore_node(bench.sandbox.folder, victim)


@pytest.mark.long
def test_preempted_while_a_node_does_not_answer(bench):
    """SLURM calls the job SIGNALING then, not RUNNING, until the node answers or is given up."""
    run, job = bench.submit({"steps": 3000}, nodes=2, tasks=1)
    bench.at_step(run, 12)
    state = bench.slurm.job(job)
    (silent,) = {*state.nodes} - {state.batch_host}
    try:
        sandboxes.lose_node(bench.sandbox.folder, silent)
        high = bench.slurm.submit(
            "--partition=high",
            "--exclusive",
            f"--nodelist={state.batch_host}",
            "--output=/dev/null",
            "--wrap=sleep 60",
        )
        verdict = bench.verdict(run, 1)
        assert (verdict["event"], verdict["ending"]) == ("requeue", "preempted")
        assert run.cancelled_jobs() == set()
        bench.slurm.cancel([high])
    finally:
        sandboxes.restore_node(bench.sandbox.folder, silent)
    bench.come_back(job)
    bench.at_step(run, run.attempt(1).outcome()["step"] + 1, attempt=2)


@pytest.mark.long
def test_a_node_is_lost_and_its_ranks_live_on(bench):
    run, job = bench.submit({"steps": 3000})
    bench.at_step(run, 12)
    victim = bench.slurm.job(job).batch_host
    try:
        sandboxes.lose_node(bench.sandbox.folder, victim)
        bench.until(lambda: bench.slurm.job(job).restarts == 1, 90)
        bench.come_back(job)
        bench.until(lambda: (run.attempts_dir / "2" / "metrics.jsonl").exists(), 60)
        logs = [run.attempts_dir / "1" / f"rank-{rank}.out" for rank in (0, 1)]
        bench.until(lambda: all("a later attempt owns" in log.read_text() for log in logs), 30)
        before = (run.attempts_dir / "1" / "metrics.jsonl").stat().st_size
        time.sleep(2)
        assert (run.attempts_dir / "1" / "metrics.jsonl").stat().st_size == before
        # srun gave up on the node before the next attempt claimed, or after: then nothing may be written
        verdict = history.last_verdict(run.attempt(1))
        assert verdict is None or verdict["ending"] == "requeued already"
        assert run.newest().number == 2
    finally:
        sandboxes.restore_node(bench.sandbox.folder, victim)


@pytest.mark.long
def test_ranks_of_a_lost_node_finish_the_run_before_the_next_attempt(bench, tmp_path):
    """Their node does not answer, and their job waits to run again: it finds nothing left to do."""
    requeued = tmp_path / "requeued"
    run, job = bench.submit({"steps": 30, "waits": {"step": 15, "file": str(requeued)}})
    bench.at_step(run, 12)
    victim = bench.slurm.job(job).batch_host
    try:
        sandboxes.lose_node(bench.sandbox.folder, victim)
        bench.until(lambda: bench.slurm.job(job).restarts == 1, 90)
        assert not run.finished(), "the ranks did not wait"
        assert history.last_verdict(run.attempt(1)) is None or bench.verdict(run, 1)["event"] == "note"
        requeued.touch()
        bench.until(run.finished, 90)
        bench.slurm.cancel([job])
        bench.gone(job)
        assert str(bench.state(run)) == "FINISHED"
        bench.check_whole(run, 30, 2)
    finally:
        sandboxes.restore_node(bench.sandbox.folder, victim)


def wrapped(folder, refuses):
    """A folder with an scontrol that refuses one verb as a real one would, and passes everything else on."""
    folder.mkdir()
    real = subprocess.run(["which", "scontrol"], capture_output=True, text=True, check=True).stdout.strip()
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\n{refuses}\nexec {real} "$@"\n')
    program.chmod(0o755)
    return f"export PATH={folder}:$PATH"


@pytest.mark.long
def test_a_refused_requeue_is_tried_and_then_left_to_the_user(bench, tmp_path):
    line = wrapped(
        tmp_path / "bin", 'if [ "$1" = requeue ]; then echo "Requested operation is disabled" >&2; exit 1; fi'
    )
    run, job = bench.submit({"crash": {"step": 2, "rank": 0}}, setup=[line])
    assert bench.gone(job, 90) == "FAILED"
    assert bench.slurm.job(job).exit_code == 85
    state = bench.state(run)
    assert (state.name, state.detail) == ("STOPPED", "SLURM refused to requeue the job")


@pytest.mark.long
def test_a_silent_slurm_leaves_mark_and_outcome(bench, tmp_path):
    silent = 'if [ "$1" = show ]; then echo "Unable to contact slurm controller" >&2; exit 1; fi'
    line = wrapped(tmp_path / "bin", silent)
    run, job = bench.submit({"raises": {"step": 2, "rank": 1, "error": "DataError"}}, setup=[line])
    assert bench.verdict(run, 1)["event"] == "fail"
    other, second = bench.submit({"steps": 200}, setup=[line])
    bench.at_step(other, 3)
    cancel(other, Queue(bench.slurm))
    assert bench.verdict(other, 1)["event"] == "cancel"
    assert bench.gone(job) == "FAILED"
    assert bench.gone(second) == "CANCELLED"


def test_a_node_without_the_code_is_left_once(bench):
    """As where a folder is not mounted: no claim and no verdict can run; the shell requeues, once."""
    run, job = bench.submit({"steps": 3}, code=bench.folder / "absent")
    bench.until(lambda: bench.slurm.job(job).restarts == 1)
    shutil.copytree(bench.code, bench.folder / "absent")
    bench.come_back(job)
    bench.finished(run, job, 1, 3, 1)


def test_scancel_during_the_setup(bench):
    run, job = bench.submit({"steps": 3}, setup=["sleep 20"])
    bench.until(lambda: bench.slurm.job(job).state == "RUNNING")
    time.sleep(0.5)
    subprocess.run(["scancel", job], check=True)
    assert bench.gone(job) == "CANCELLED"
    assert run.cancelled_jobs() == {job}
    assert bench.state(run).name == "CANCELLED"


def test_a_rank_preempted_before_its_handlers_stand(bench):
    """TERM is held back until they do: the rank stops, and the environment is not to blame."""
    slow = bench.folder / "slow"
    slow.mkdir()
    late = (
        "import os, time\nif 'SLURM_STEP_ID' in os.environ and 'SLURM_PROCID' in os.environ: time.sleep(4)\n"
    )
    (slow / "sitecustomize.py").write_text(late)
    run, job = bench.submit({"steps": 5}, setup=[f"export PYTHONPATH={slow}:$PYTHONPATH"])
    bench.until(lambda: (run.attempts_dir / "1").exists())
    time.sleep(1.5)
    assert not list((run.attempts_dir / "1").glob("events-rank-*"))
    preempt(bench.sandbox.folder, job, come_back=False)
    verdict = bench.verdict(run, 1)
    assert run.attempt(1).outcome()["outcome"] == "stopped"
    assert (verdict["event"], verdict["ending"], verdict["counts"]) == ("requeue", "preempted", False)
    bench.come_back(job)
    bench.finished(run, job, 2, 5, 1)
