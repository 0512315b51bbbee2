"""What a site check says of the reports of its job: pure, each fault with what to do."""

import copy
import json
import time

import pytest

from clipcluster.recipe.sections.cluster import Cluster
from jobs.sites import node, reports
from jobs.sites.check import Found
from jobs.sites.findings import findings
from jobs.sites.task import nccl_network
from tools.slurm import JobState


def report(rank, **changed):
    """What a rank of a healthy cluster reports."""
    reduced = {"right": True, "bytes": 16 << 20, "seconds": 0.01, "bus": 1.6e9}
    facts = {
        "rank": rank,
        "node": f"n{rank + 1}",
        "size": 2,
        "python": "3.11.7",
        "executable": "/env/bin/python",
        "cpus": 8,
        "memory_mb": 512 << 10,
        "shm_mb": 256 << 10,
        "gpus": 1,
        "interfaces": {"eth0": {"address": "10.0.0.1", "mbit": 10000}},
        "infiniband": ["mlx5_0: 200 Gb/sec (4X HDR)"],
        "file_system": "nfs4",
        "first_folder": rank == 0,
        "first_file": rank == 1,
        "torch": "2.15.0",
        "torch_seconds": 4.2,
        "device": "cuda:0 (NVIDIA A100)",
        "device_lacks": False,
        "address": "10.0.0.1",
        "clock_offsets": [0.0, 0.002],
        "seen_after": [0.0, 0.4],
        "gloo": reduced,
        "nccl": {**reduced, "network": "IB"},
        "ahead_at_most": 0.3,
        "done": True,
    }
    return {key: value for key, value in {**facts, **changed}.items() if value is not None}


def found(ranks=None, batch=None, **more):
    batch = {
        "node": "n1",
        "code": 0,
        "python": "x",
        "show": "",
        "seconds": 0.02,
        "requeue": "",
        **(batch or {}),
    }
    return Found(
        more.pop("cluster", Cluster(cpus_per_task=8)),
        "17",
        {each["rank"]: each for each in ([report(0), report(1)] if ranks is None else ranks)},
        batch,
        {0: 0.4, 1: 0.4},
        **more,
    )


def wrong(what):
    """What, kind and advice of all that is not in order; nothing in order has advice."""
    lines = findings(what)
    assert all(bool(line.advice) == (line.kind != "ok") for line in lines)
    return [(line.what, line.kind) for line in lines if line.kind != "ok"]


def test_a_healthy_cluster():
    lines = findings(found())
    assert wrong(found()) == []
    text = "\n".join(f"{line.what}: {line.found}" for line in lines)
    for part in (
        "job: job 17: 2 ranks on 2 nodes (n1, n2)",
        "node n2: 8 CPUs a rank, 512 GB, cuda:0 (NVIDIA A100)",
        "software: Python 3.11.7 (/env/bin/python), torch 2.15.0, imported in 4 s",
        "network: eth0 10.0.0.1 (10 Gbit/s), mlx5_0: 200 Gb/sec (4X HDR); the ranks meet at 10.0.0.1 (eth0)",
        "shared folder: the folder of runs is on nfs4; what a rank writes is seen after 0.40 s",
        "clocks: the nodes' clocks differ by 0.002 s",
        "clocks: the clock of n1 minus this machine's: -0.4 to +0.3 s",
        "all-reduce: gloo, 2 ranks on 2 nodes: 16 MiB in 10.0 ms, 1.60 GB/s",
        "all-reduce: nccl over IB, 2 ranks on 2 nodes",
        "scontrol: answers on n1 in 0.02 s",
        "requeue: the job may requeue itself",
    ):
        assert part in text


FAULTS = {
    "no GPU": ({"device": "torch finds no GPU", "device_lacks": True, "nccl": None}, "node n2", "error"),
    "few cores": ({"cpus": 2}, "node n2", "warning"),
    "small shm": ({"shm_mb": 64}, "node n2", "warning"),
    "slow import": ({"torch_seconds": 90.0}, "software", "warning"),
    "no torch": (
        {"executable": "/usr/bin/python3", "torch": None, "error": "No module"},
        "software",
        "error",
    ),
    "own folder": ({"first_folder": True}, "shared folder", "error"),
    "no link": ({"first_file": False}, "shared folder", "error"),
    "wrong sum": (
        {"gloo": {"right": False, "bytes": 1 << 20, "seconds": 1.0, "bus": 1.0}},
        "all-reduce",
        "error",
    ),
    "lost": ({"error": "LostPeers: rank 1 could not reach"}, "all-reduce", "error"),
}


def test_nodes_without_the_interface_of_the_profile():
    never = dict.fromkeys(("address", "clock_offsets", "seen_after", "gloo", "nccl"))
    lacking = [report(rank, **never, interface_error="no interface ib7") for rank in (0, 1)]
    assert wrong(found(lacking)) == [("network", "error")]
    timed_out = report(0, **never, done=None, error="TimeoutError: rank 1 did not come")
    other = {**lacking[1], "interfaces": {"ib0": {"address": "10.1.0.1", "mbit": 0}}}
    (network,) = [line for line in findings(found([timed_out, other])) if line.what == "network"]
    assert (network.kind, network.found) == (
        "error",
        "ib0 10.1.0.1, mlx5_0: 200 Gb/sec (4X HDR); no interface ib7",
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_one_rank(fault):
    changed, what, kind = FAULTS[fault]
    assert (what, kind) in wrong(found([report(0), report(1, **changed)]))


@pytest.mark.parametrize(
    ("changed", "what", "kind"),
    [
        ({"seen_after": [0.0, None]}, "shared folder", "error"),
        ({"seen_after": [0.0, 31.0]}, "shared folder", "warning"),
        ({"clock_offsets": [0.0, -7.0]}, "clocks", "warning"),
        ({"ahead_at_most": -30.0}, "clocks", "warning"),
        (
            {
                "interfaces": {
                    "eth0": {"address": "10.0.0.1", "mbit": 1000},
                    "ib0": {"address": "x", "mbit": 100000},
                }
            },
            "network",
            "warning",
        ),
        (
            {"nccl": {"right": True, "bytes": 1 << 28, "seconds": 2.0, "bus": 1e9, "network": "Socket"}},
            "all-reduce",
            "warning",
        ),
    ],
)
def test_faults_of_the_cluster(changed, what, kind):
    assert wrong(found([report(0, **changed), report(1)])) == [(what, kind)]


def test_an_interface_that_was_named_is_not_argued_with():
    faster = {"eth0": {"address": "10.0.0.1", "mbit": 1000}, "ib0": {"address": "x", "mbit": 100000}}
    named = Cluster(cpus_per_task=8, interface="eth0")
    assert wrong(found([report(0, interfaces=faster), report(1)], cluster=named)) == []


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        ({"show": "Unable to contact slurm controller"}, "scontrol"),
        ({"requeue": "Requested operation is presently disabled"}, "requeue"),
    ],
)
def test_scontrol_and_the_requeue(batch, what):
    assert wrong(found(batch=batch)) == [(what, "error")]


def test_jobs_that_did_not_report():
    nothing = found([], ended="ended as TIMEOUT", log="slurmstepd: error")
    assert wrong(nothing)[0] == ("job", "error")
    assert (
        "ended as TIMEOUT, and no rank reported; its last lines:\nslurmstepd: error"
        in findings(nothing)[0].found
    )
    half = found([report(0)])
    assert wrong(half)[0] == ("job", "error")
    assert "1 rank of 2 did not report ([1])" in findings(half)[0].found
    silent = found()
    silent.batch = None
    silent.end(JobState("17", "FAILED", "None", "low", 0, 1, None, None, (), None, ()))
    assert wrong(silent) == [("job", "warning"), ("scontrol", "error")]
    killed = found([report(0), report(1, done=None)], batch={"code": 143})
    assert wrong(killed) == [("job", "error")]
    assert "1 rank did not finish (srun's code: 143)" in findings(killed)[0].found
    waits = found([], waits="PartitionTimeLimit")
    assert findings(waits)[0].found == "job 17 does not start: PartitionTimeLimit"
    one = found([report(0, size=1, node="n1", first_file=True, nccl=None)], cluster=Cluster(gpus_per_node=0))
    assert wrong(one) == [("all-reduce", "warning")]


def test_a_requeue_that_left_no_time_to_say_so():
    quick = found()
    del quick.batch["requeue"]
    state = JobState("17", "PENDING", "BeginTime", "low", 1, 0, None, None, (), None, ())
    quick.end(state)
    assert (quick.batch["requeue"], quick.ended) == ("", "")
    taken = copy.deepcopy(quick)
    taken.batch = None
    taken.end(state)
    assert taken.ended.startswith("was requeued (preempted")


def test_clocks_are_bounded_from_both_sides(tmp_path):
    """The node's clock is ten seconds ahead; the submitter's file is two seconds old at first."""
    (tmp_path / reports.CLOCK).write_text(json.dumps({"time": time.time() - 12}))
    own = reports.Report(tmp_path, 0)
    own.add(size=1)
    assert own.said["ahead_at_most"] == pytest.approx(12, abs=0.5)
    (tmp_path / reports.CLOCK).write_text(json.dumps({"time": time.time() - 10}))
    own.add()
    (tmp_path / reports.CLOCK).write_text(json.dumps({"time": time.time() - 15}))
    own.add()
    assert own.said["ahead_at_most"] == pytest.approx(10, abs=0.5)
    seen = found([])
    seen.behind = {}
    file = reports.rank_file(tmp_path, 0)
    file.write_text(json.dumps({**own.said, "time": time.time() + 9}))  # read a second after it was written
    seen.look(tmp_path)
    assert -seen.behind[0] == pytest.approx(9, abs=0.5)
    file.write_text("{torn")
    seen.look(tmp_path)
    assert set(seen.ranks) == {0}


def test_the_parts_of_a_node(tmp_path):
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("200 Gb/sec (4X HDR)\n")
    down = tmp_path / "mlx5_1" / "ports" / "1"
    down.mkdir(parents=True)
    (down / "state").write_text("1: DOWN\n")
    (down / "rate").write_text("10 Gb/sec\n")
    assert node.infiniband(tmp_path) == ["mlx5_0: 200 Gb/sec (4X HDR)"]
    here = node.facts(tmp_path)
    assert here["cpus"] >= 1
    assert here["memory_mb"] > 100
    assert "lo" not in here["interfaces"]
    log = "n1:7:7 [0] NCCL INFO NET/Socket : Using [0]lo:127.0.0.1<0>\n"
    log += "n1:7:7 [0] NCCL INFO Using network Socket\n"
    assert (nccl_network(log), nccl_network("")) == ("Socket", "")
