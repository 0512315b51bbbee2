"""A process finds its rank from what launchers set."""

import os
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.errors import UserError
from clipcluster.runtime.job_id import local_job_id, local_job_runs
from clipcluster.runtime.launch import Launch, _tasks_of_node

# What `srun` on two nodes with two tasks each sets for the last task (Slurm 22.05).
SLURM = {
    "SLURM_JOB_ID": "41",
    "SLURM_JOBID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}


def test_slurm_step():
    assert Launch.from_environment(SLURM) == Launch(3, 4, 1, 2, 1, 2, "41", "slurm")


def test_member_of_an_array():
    array = {**SLURM, "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "7"}
    assert Launch.from_environment(array).job_id == "40_7"


def test_shell_inside_an_allocation_is_no_step():
    shell = {name: value for name, value in SLURM.items() if "STEP" not in name and name != "SLURM_PROCID"}
    launch = Launch.from_environment(shell)
    assert (launch.manager, launch.rank, launch.size) == ("single", 0, 1)
    # The batch script itself: SLURM gives it a rank, but no step.
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert Launch.from_environment(batch).manager == "single"


def test_smaller_step_of_a_larger_job():
    step = {**SLURM, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    assert Launch.from_environment(step).size == 4


def test_submitit_local():
    environ = {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": "4711",
        "SUBMITIT_LOCAL_NTASKS": "2",
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_GLOBALID": "1",
        "SUBMITIT_LOCAL_LOCALID": "1",
    }
    assert Launch.from_environment(environ) == Launch(1, 2, 1, 2, 0, 1, "4711", "local")
    # Started from a shell inside an allocation: the local executor is the inner one.
    assert Launch.from_environment({**SLURM, **environ}).manager == "local"


def test_submitit_says_so_itself(tmp_path):
    submitit = pytest.importorskip("submitit")
    executor = submitit.LocalExecutor(tmp_path)
    executor.update_parameters(tasks_per_node=2, timeout_min=1)
    job = executor.submit(Launch.from_environment)
    launches = job.results()
    assert [(launch.rank, launch.size, launch.local_size, launch.manager) for launch in launches] == [
        (0, 2, 2, "local"),
        (1, 2, 2, "local"),
    ]
    assert {launch.job_id for launch in launches} == {job.job_id}


def test_torchrun():
    environ = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2",
    }
    launch = Launch.from_environment({**SLURM, **environ})
    assert launch == Launch(5, 8, 1, 4, 1, 2, launch.job_id, "torchrun")


def test_nobody():
    launch = Launch.from_environment({})
    assert launch == Launch(0, 1, 0, 1, 0, 1, launch.job_id, "single")
    assert local_job_runs(launch.job_id)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({**SLURM, "SLURM_PROCID": "4"}, "rank 4 of 4"),
        ({"SUBMITIT_LOCAL_GLOBALID": "0", "SUBMITIT_LOCAL_NTASKS": ""}, "SUBMITIT_LOCAL_NTASKS is ''"),
    ],
)
def test_contradictions_are_told(environ, message):
    with pytest.raises(UserError, match=message):
        Launch.from_environment(environ)


@given(counts=st.lists(st.integers(1, 64), min_size=1, max_size=12))
def test_tasks_of_a_node(counts):
    parts = []
    for node, count in enumerate(counts):
        if node and counts[node - 1] == count:
            parts[-1][1] += 1
        else:
            parts.append([count, 1])
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in parts)
    assert [_tasks_of_node(text, node) for node in range(len(counts))] == counts


def test_local_job_ids_tell_who_lives():
    assert local_job_runs(local_job_id()) is True
    code = "from clipcluster.runtime.job_id import local_job_id; print(local_job_id())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    assert ended.startswith(f"local-{socket.gethostname()}-")
    assert local_job_runs(ended) is False


def test_another_process_with_the_same_pid_is_not_the_job():
    stem, _, start = local_job_id().rpartition("-")
    assert local_job_runs(f"{stem}-{int(start) + 1}") is False


def test_a_zombie_runs_no_more():
    process = subprocess.Popen(
        [sys.executable, "-c", "from clipcluster.runtime.job_id import local_job_id; print(local_job_id())"],
        stdout=subprocess.PIPE,
        text=True,
    )
    job = process.stdout.read().strip()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert local_job_runs(job) is False
    process.wait()


@pytest.mark.parametrize("job", ["41", "41_3", "local-elsewhere-12-34", "local-", ""])
def test_jobs_of_others_are_not_known(job):
    assert local_job_runs(job) is None
