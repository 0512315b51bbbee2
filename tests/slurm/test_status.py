"""The account of a run on a real cluster, and the notifications of it."""

from __future__ import annotations

import pytest

from clipcluster.runs.folder import Run
from jobs.accounting import ALLOCATED
from jobs.state import Queue, state_of
from jobs.status import accounts_of, report
from tools.sandbox.preempt import preempt

pytestmark = [pytest.mark.slurm, pytest.mark.long]


def test_a_preempted_run_is_accounted_for_and_told_of(bench):
    command = 'echo "$CLIPCLUSTER_EVENT $SLURM_JOB_ID" >> told; sleep 60'
    run = Run.create(
        bench.folder / "told", {"name": "run"}, {"on_event": command, "plan": {"total_steps": 40}}
    )
    job = bench.submit_again(run, {"steps": 40, "seconds": 0.3})
    bench.at_step(run, 7)
    live = report(run, Queue())
    assert (live["state"], live["total_steps"]) == ("RUNNING", 40)
    assert 0 < live["goodput"] < 1
    assert preempt(bench.sandbox.folder, job, come_back=False).requeued
    bench.verdict(run, 1)
    bench.come_back(job)
    bench.finished(run, job, 2, 40, 1)
    shown = bench.until(lambda: (found := bench.slurm.job(job)) and found.state == "COMPLETED" and found)

    assert (run.path / "told").read_text().split() == ["requeue", job, "finish", job]
    first, second = accounts_of(run, state_of(run, Queue()))
    assert (first.ending, second.ending) == ("preempted", "finished")
    for account in (first, second):
        assert account.ranks == 2
        assert account.began < run.attempt(account.number).claim()["time"], "the batch script came first"
        allocated = sum(account.spent[kind] for kind in ALLOCATED)
        assert allocated == pytest.approx(account.ended - account.began, rel=0.001)
        assert account.spent["train"] > account.spent["lost"] == 0
    assert second.spent["requeue"] == pytest.approx(second.began - first.ended)
    # SLURM's clock counts whole seconds, and the job waited for the command that hangs
    ended = shown.end_time.timestamp() - second.began
    assert second.seconds <= ended + 1 <= second.seconds + 16
