"""What a preemption costs: no step, and from the signal to free nodes one step, the save, and 3 s at most."""

from __future__ import annotations

import pytest

from clipcluster.runs.merge import lines, merged_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.long]
STEP, SAVE = 0.5, 1.0  # seconds


@pytest.mark.parametrize("sandbox", [False, True], indirect=True, ids=["TERM", "USR2"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_no_step_is_lost_and_the_nodes_are_free_in_time(bench, preempt_and_watch, nodes):
    run, job = bench.submit({"steps": 20, "seconds": STEP, "save_seconds": SAVE}, nodes=nodes)
    bench.at_step(run, 7)
    preemption, seconds = preempt_and_watch(job)
    print(f"{nodes} nodes: {seconds:.2f} s from the signal to free nodes")
    assert preemption.requeued
    assert seconds <= STEP + SAVE + 3.0
    bench.come_back(job)
    bench.finished(run, job, 2, 20, nodes)
    assert len(list(lines(run, "metrics.jsonl"))) == len(merged_metrics(run)) == 20, "no step was made twice"
