"""Ranks of a world: each joins over the run folder, does one collective again and again, says how it ended.

Arguments: ranks (JSON), size, run folder, collective, what happens at the tenth round (kill or sleep: to the
last rank; kill rank 0; -), timeout in seconds.
"""

import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from clipcluster.errors import StaleAttempt
from clipcluster.runs.folder import Run
from clipcluster.runtime.launch import Launch
from clipcluster.runtime.outcome import DataError, LostPeers
from clipcluster.runtime.stop import Wish
from clipcluster.runtime.world import World, is_lost_peer

SLOW_S = 5.0  # of rank 0's work in `values`: longer than the silence that the test allows


def say(**fields):
    os.write(1, json.dumps(fields).encode() + b"\n")  # in one piece: the ranks share the pipe


def collectives(world):
    model = DistributedDataParallel(torch.nn.Linear(4, 4)) if world.size > 1 else torch.nn.Linear(4, 4)
    return {
        "agree": lambda: world.agree(Wish.NONE),
        "broadcast": lambda: world.broadcast({"step": 1}),
        "backward": lambda: model(torch.randn(2, 4)).sum().backward(),
        "gather": lambda: world.gather(1),
    }


def values(world):
    """What every collective gives where all ranks live."""
    return {
        "agree": int(world.agree([Wish.STOP, Wish.SAVE, Wish.ABORT][world.rank % 3])),
        "none": int(world.agree(Wish.NONE)),
        "plain": world.broadcast({"from": world.rank, "text": "é" * world.rank}, src=world.size - 1),
        "all": world.gather([world.rank] * world.rank),
        "slow": slow(world),
        "sum": world.all_reduce_sum(torch.full((2,), float(world.rank + 1))).tolist(),
        "main": world.is_main,
    }


def slow(world):
    """What rank 0's work gives, which makes progress once, and the signs of life of this rank meanwhile."""

    def work():
        time.sleep(SLOW_S / 2)
        world.pulse.beat()
        time.sleep(SLOW_S / 2)
        return "done"

    before = world.pulse.beats
    return [world.while_main(work), world.pulse.beats - before]


def failures(world):
    """How an error of one rank arrives at the others."""
    arrived = []
    for error in (
        DataError("0.tar changed", "index it again"),
        StaleAttempt("later"),
        OSError("full"),
    ):
        try:
            world.raise_first(error if world.rank == 1 else None)
        except Exception as raised:
            arrived.append([repr(raised), getattr(raised, "advice", ""), getattr(raised, "agreed", None)])
    world.raise_first(None)
    try:
        world.while_main(lambda: json.loads("{") if world.is_main else None)
    except ValueError as own:
        arrived.append(["own", type(own).__name__])
    except RuntimeError as raised:
        arrived.append(["another's", str(raised)])
    return {"arrived": arrived}


def no_pickles(*_, **__):
    raise AssertionError("ranks exchange plain data alone")


def rounds(world, name, mishap):
    collective = collectives(world)[name]
    for number in range(10_000):
        last = world.rank == world.size - 1
        if number == 10:
            if (mishap == "kill" and last) or (mishap == "kill rank 0" and world.is_main):
                os.kill(os.getpid(), signal.SIGKILL)
            if mishap == "sleep" and last:
                time.sleep(60)
        collective()


def serve(rank, size, folder, name, mishap, timeout):
    """One rank to its end; returns its exit code."""
    attempt = Run(folder).newest()
    began = time.monotonic()
    try:
        world = World.join(
            Launch(rank, size, rank, size, 0, 1, "1", "single"),
            publish=attempt.publish,
            find=attempt.find,
            device=torch.device("cpu"),
            timeout_s=timeout,
        )
        dist.distributed_c10d._object_to_tensor = dist.distributed_c10d._tensor_to_object = no_pickles
        if name in ("values", "failures"):
            say(rank=rank, **{"values": values, "failures": failures}[name](world))
            world.barrier()
            world.leave()
            return 0
        began = time.monotonic()
        rounds(world, name, mishap)
    except (LostPeers, RuntimeError) as error:
        lost = is_lost_peer(error)
        kind = type(error).__name__
        say(rank=rank, lost=lost, kind=kind, seconds=time.monotonic() - began, at=time.time())
        return 0 if lost else 3
    return 4


def main():
    ranks, size, folder, name, mishap, timeout = sys.argv[1:]
    torch.set_num_threads(1)
    children = {}
    for rank in json.loads(ranks):  # forked: importing torch once is enough
        child = os.fork()
        if child == 0:
            os._exit(serve(rank, int(size), folder, name, mishap, float(timeout)))
        children[child] = rank
    while children:
        child, status = os.wait()
        rank = children.pop(child)
        say(rank=rank, code=os.waitstatus_to_exitcode(status), ended=time.time())
        if mishap == "sleep":
            for sleeper in children:
                os.kill(sleeper, signal.SIGKILL)


if __name__ == "__main__":
    main()
