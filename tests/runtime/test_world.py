"""Real processes meet, agree, and notice each other's death."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clipcluster.errors import UserError
from clipcluster.runs.folder import Run
from clipcluster.runtime.place import Place
from clipcluster.runtime.stop import LostPeers, Wish
from clipcluster.runtime.world import World, _address, is_lost_peer

PEER = Path(__file__).with_name("world_peer.py")
SINGLE = Place(0, 1, 0, 1, 0, 1, "1", "single")


@pytest.fixture
def attempt(tmp_path):
    run = Run.create(tmp_path / "run", {}, {})
    return run.claim("1", host="n1", still_running=lambda job: False)


_started = []


@pytest.fixture(autouse=True)
def _none_left():
    """No rank outlives its test."""
    yield
    for process in _started:
        if process.poll() is None:
            process.kill()
            process.communicate()
    _started.clear()


def start(attempt, size, collective, mishap="-", timeout=60, ranks=None):
    processes = [
        subprocess.Popen(
            [sys.executable, PEER, str(rank), str(size), attempt.run, collective, mishap, str(timeout)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (range(size) if ranks is None else ranks)
    ]
    _started.extend(processes)
    return processes


def finish(processes):
    """What each process said, and how it ended."""
    texts = [process.communicate(timeout=120)[0] for process in processes]
    return [json.loads(text) if text else None for text in texts], [p.returncode for p in processes]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_meet_and_agree(attempt, size):
    said, codes = finish(start(attempt, size, "values"))
    assert codes == [0] * size
    wishes = Wish.STOP | Wish.SAVE | (Wish.ABORT if size == 3 else Wish.NONE)
    for rank, values in enumerate(said):
        assert values == {
            "agree": int(wishes),
            "none": 0,
            "object": {"from": size - 1},
            "sum": [size * (size + 1) / 2] * 2,
            "main": rank == 0,
        }
    address, _, token = attempt.find(1)
    assert address == "127.0.0.1"
    assert token


@pytest.mark.parametrize(
    ("size", "collective"),
    [(2, "agree"), (3, "agree"), (3, "backward"), (3, "broadcast"), (2, "gather")],
)
def test_a_killed_peer_is_noticed_at_once(attempt, size, collective):
    processes = start(attempt, size, collective, "kill")
    processes[-1].wait(timeout=60)
    died = time.time()
    said, codes = finish(processes)
    assert codes == [0] * (size - 1) + [-9]
    for values in said[:-1]:
        assert values["lost"]
        assert values["at"] - died < 5
    if collective in ("agree", "broadcast"):
        assert {values["kind"] for values in said[:-1]} == {"LostPeers"}


@pytest.mark.parametrize("collective", ["agree", "backward"])
def test_a_silent_peer_is_noticed_after_the_timeout(attempt, collective):
    processes = start(attempt, 2, collective, "sleep", timeout=6)
    said, codes = finish(processes[:1])
    processes[1].kill()
    processes[1].communicate()
    assert codes == [0]
    assert said[0]["lost"]
    assert 5 < said[0]["seconds"] < 12


def test_a_peer_that_never_comes(attempt):
    said, codes = finish(start(attempt, 2, "agree", timeout=3, ranks=[0]))
    assert codes == [0]
    assert said[0]["kind"] == "LostPeers"


def test_rank_0_never_comes(attempt):
    with pytest.raises(LostPeers, match="rank 1 of 2 did not meet the others: rank 0 published no address"):
        World.join(
            Place(1, 2, 1, 2, 0, 1, "1", "single"),
            publish=attempt.publish,
            find=attempt.find,
            device=torch.device("cpu"),
            timeout_s=0.2,
        )


def test_rank_0_is_gone_already(attempt):
    attempt.publish("127.0.0.1", 9, "token")  # the discard port: nobody listens
    with pytest.raises(LostPeers):
        World.join(
            Place(1, 2, 1, 2, 0, 1, "1", "single"),
            publish=attempt.publish,
            find=attempt.find,
            device=torch.device("cpu"),
            timeout_s=1,
        )


def test_alone():
    world = World.join(
        SINGLE,
        publish=lambda *_: pytest.fail("published"),
        find=lambda _: pytest.fail("searched"),
        device=torch.device("cpu"),
        timeout_s=1,
    )
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.agree(Wish.STOP) == Wish.STOP
    assert world.broadcast_object("a") == "a"
    assert world.all_reduce_sum(torch.ones(2)).tolist() == [1, 1]
    world.barrier()
    world.leave()
    assert not torch.distributed.is_initialized()


def test_an_interface_that_is_not_there(attempt, monkeypatch):
    monkeypatch.setenv("CLIPCLUSTER_INTERFACE", "ib9")
    with pytest.raises(UserError, match=r"no network interface 'ib9'; it has .*lo"):
        World.join(
            Place(0, 2, 0, 1, 0, 2, "1", "slurm"),
            publish=attempt.publish,
            find=attempt.find,
            device=torch.device("cpu"),
            timeout_s=1,
        )


def test_addresses():
    assert _address("lo") == "127.0.0.1"
    assert len(_address(None).split(".")) == 4


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (LostPeers("x"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
        (torch.distributed.DistNetworkError("x"), True),
        (torch.distributed.DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected"), False),
        (torch.distributed.DistBackendError("ncclRemoteError: A call failed possibly due to"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_what_a_lost_peer_looks_like(error, lost):
    assert is_lost_peer(error) is lost


def test_the_cause_counts():
    error = ValueError("wrapped")
    error.__cause__ = RuntimeError("Connection closed by peer [127.0.0.1]:1")
    assert is_lost_peer(error)
