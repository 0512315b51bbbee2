"""Real processes meet, agree, and notice each other's death."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipcluster.runs.folder import Run
from clipcluster.runtime.launch import Launch
from clipcluster.runtime.outcome import DataError, LostPeers
from clipcluster.runtime.stop import Wish
from clipcluster.runtime.world import World, is_lost_peer

PEER = Path(__file__).with_name("world_peer.py")
SINGLE = Launch(0, 1, 0, 1, 0, 1, "1", "single")


@pytest.fixture
def attempt(tmp_path):
    run = Run.create(tmp_path / "run", {}, {})
    return run.claim("1", host="n1", still_running=lambda job: False)


@pytest.fixture
def start(attempt):
    """Starts ranks in the background; none outlives its test."""
    started = []

    def begin(size, collective, mishap="-", timeout=60, ranks=None):
        arguments = [json.dumps(ranks or list(range(size))), size, attempt.run, collective, mishap, timeout]
        process = subprocess.Popen(
            [sys.executable, PEER, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def finish(process):
    """What each rank said and how it ended, by rank."""
    said = {}
    for line in process.communicate(timeout=120)[0].splitlines():
        fields = json.loads(line)
        said.setdefault(fields.pop("rank"), {}).update(fields)
    return [said[rank] for rank in sorted(said)]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_meet_and_agree(attempt, start, size):
    # Rank 0 works alone for longer than a rank may be silent.
    said = finish(start(size, "values", timeout=3))
    wishes = Wish.STOP | Wish.SAVE | (Wish.ABORT if size == 3 else Wish.NONE)
    for rank, values in enumerate(said):
        del values["ended"]
        assert values == {
            "agree": int(wishes),
            "none": 0,
            "plain": {"from": size - 1, "text": "é" * (size - 1)},
            "all": [[rank] * rank for rank in range(size)],
            # the work made progress once; the others hear of it, and that it began; two collectives
            "slow": ["done", 3 if rank == 0 else 4],
            "sum": [size * (size + 1) / 2] * 2,
            "main": rank == 0,
            "code": 0,
        }
    assert len(said) == size
    address, _, token = attempt.find(1)
    assert address == "127.0.0.1"
    assert token


def test_an_error_of_one_rank_is_raised_on_all(start):
    own, others = ["own", "JSONDecodeError"], "JSONDecodeError: Expecting property name enclosed in double"
    for rank, said in enumerate(finish(start(3, "failures"))):
        *errors, last = said["arrived"]
        assert errors == [
            ["DataError('0.tar changed')", "index it again", True],
            ["StaleAttempt('later')", "", None],
            [
                "OSError('full')" if rank == 1 else "RuntimeError('OSError: full')",
                "",
                None,
            ],
        ]
        assert last == own if rank == 0 else last[0] == "another's" and last[1].startswith(others)


@pytest.mark.parametrize(
    ("size", "collective"),
    [
        (3, "agree"),
        (3, "backward"),
        pytest.param(2, "agree", marks=pytest.mark.long),
        pytest.param(3, "broadcast", marks=pytest.mark.long),
        pytest.param(2, "gather", marks=pytest.mark.long),
    ],
)
def test_a_killed_peer_is_noticed_at_once(start, size, collective):
    *others, killed = finish(start(size, collective, "kill"))
    assert killed["code"] == -9
    assert len(others) == size - 1
    for rank in others:
        assert rank["lost"]
        assert rank["code"] == 0
        assert rank["at"] - killed["ended"] < 5
        if collective in ("agree", "broadcast"):
            assert rank["kind"] == "LostPeers"


def test_the_death_of_rank_0_is_noticed_too(start):
    killed, *others = finish(start(3, "agree", "kill rank 0"))
    assert killed["code"] == -9
    assert [rank["kind"] for rank in others] == ["LostPeers"] * 2
    assert all(rank["at"] - killed["ended"] < 5 for rank in others)


def test_a_rank_of_another_attempt_meets_nobody(attempt, start):
    process = start(2, "agree", timeout=8, ranks=[0])

    def find(timeout_s):
        address, port, _ = attempt.find(30)
        return address, port, "another attempt's token"

    with pytest.raises(LostPeers, match="rank 1 of 2 could not reach the other ranks"):
        World.join(
            Launch(1, 2, 1, 2, 0, 1, "1", "single"),
            publish=attempt.publish,
            find=find,
            device=torch.device("cpu"),
            timeout_s=1,
        )
    (rank_0,) = finish(process)
    assert rank_0["kind"] == "LostPeers"


@pytest.mark.parametrize("collective", ["agree", pytest.param("backward", marks=pytest.mark.long)])
def test_a_silent_peer_is_noticed_after_the_timeout(start, collective):
    first, sleeper = finish(start(2, collective, "sleep", timeout=6))
    assert first["lost"]
    assert 5 < first["seconds"] < 50  # the silence would last 60 s
    assert sleeper["code"] == -9


def test_the_store_listens_on_one_address(attempt, start):
    start(2, "agree", timeout=60, ranks=[0])
    address, port, _ = attempt.find(30)
    assert address == "127.0.0.1"
    with socket.create_connection((address, port), timeout=5):
        pass
    with pytest.raises(ConnectionRefusedError):  # as every other address of this machine
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_rank_0_never_comes(attempt):
    with pytest.raises(LostPeers, match="could not reach the other ranks: rank 0 published no address"):
        World.join(
            Launch(1, 2, 1, 2, 0, 1, "1", "single"),
            publish=attempt.publish,
            find=attempt.find,
            device=torch.device("cpu"),
            timeout_s=0.2,
        )


def test_rank_0_is_gone_already(attempt):
    attempt.publish("127.0.0.1", 9, "token")  # the discard port: nobody listens
    with pytest.raises(LostPeers):
        World.join(
            Launch(1, 2, 1, 2, 0, 1, "1", "single"),
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
    assert world.broadcast({"a": (1, 2.5)}) == {"a": [1, 2.5]}
    assert world.gather("a") == ["a"]
    assert world.while_main(lambda: (1,)) == [1]
    world.raise_first(None)
    with pytest.raises(DataError, match="changed"):
        world.raise_first(DataError("0.tar changed"))
    with pytest.raises(TypeError):
        world.broadcast(Path("/"))
    assert world.all_reduce_sum(torch.ones(2)).tolist() == [1, 1]
    world.barrier()
    world.leave()
    assert not torch.distributed.is_initialized()


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
