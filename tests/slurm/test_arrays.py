"""Members of an array of runs on a real cluster: a preemption requeues those that it hit, and no other."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs.folder import Run
from jobs.submit import launch, parameters
from tools.sandbox.preempt import preempt

pytestmark = [pytest.mark.slurm, pytest.mark.long]


def submit_array(bench, orders, count, nodes):
    """So many runs as one array, each member on nodes of its own; the runs and the members' ids."""
    made = time.monotonic_ns()
    runs = [Run.create(bench.folder / f"run-{made}-{n}", {"name": "run"}, {"none": 0}) for n in range(count)]
    cluster = Cluster(
        nodes=nodes,
        gpus_per_node=0,
        tasks_per_node=2,
        cpus_per_task=2,
        partition="low",
        environment={"TRAINEE": json.dumps(orders)},
        time="10 min",
    )
    array = parameters.Array(f"array-{made}", str(bench.folder), bench.folder / f"logs-{made}")
    members = [(run, bench.code) for run in runs]
    jobs = launch.array_on_slurm(cluster, members, array, grace=5, trainee="trainee:train")
    bench.jobs.extend(jobs)
    return runs, jobs


@pytest.mark.parametrize("sandbox", [False, True], indirect=True, ids=["TERM", "USR2"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_one_member_then_two_at_once(bench, nodes):
    count = 4 // nodes
    runs, jobs = submit_array(bench, {"steps": 300}, count, nodes)
    for run in runs:
        bench.at_step(run, 5)

    def evict(number):
        return preempt(bench.sandbox.folder, jobs[number], come_back=False).requeued

    assert evict(0)
    assert bench.verdict(runs[0], 1)["ending"] == "preempted"
    assert [bench.slurm.job(job).restarts for job in jobs] == [1] + [0] * (count - 1)
    bench.come_back(jobs[0])
    bench.at_step(runs[0], runs[0].attempt(1).outcome()["step"] + 1, attempt=2)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(evict, [0, 1])) == [True, True]
    assert [bench.slurm.job(job).restarts for job in jobs] == [2, 1] + [0] * (count - 2)
    verdicts = [bench.verdict(runs[0], 2), bench.verdict(runs[1], 1)]
    assert [verdict["ending"] for verdict in verdicts] == ["preempted", "preempted"]
    for job in jobs[:2]:
        bench.come_back(job)
    for number, (run, job) in enumerate(zip(runs, jobs, strict=True)):
        bench.finished(run, job, [3, 2, 1, 1][number], 300, nodes)
