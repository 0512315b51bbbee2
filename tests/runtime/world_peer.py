"""One rank of a world: joins over the run folder, does one collective again and again, says how it ended.

Arguments: rank, size, run folder, collective, what the last rank does at its tenth round (kill, sleep, -),
timeout in seconds.
"""

import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from clipcluster.runs.folder import Run
from clipcluster.runtime.place import Place
from clipcluster.runtime.stop import LostPeers, Wish
from clipcluster.runtime.world import World, is_lost_peer


def say(**fields):
    print(json.dumps(fields), flush=True)


def collectives(world):
    model = DistributedDataParallel(torch.nn.Linear(4, 4)) if world.size > 1 else torch.nn.Linear(4, 4)
    return {
        "agree": lambda: world.agree(Wish.NONE),
        "broadcast": lambda: world.broadcast_object({"step": 1}),
        "backward": lambda: model(torch.randn(2, 4)).sum().backward(),
        "gather": lambda: dist.all_gather_object([None] * world.size, 1),
    }


def values(world):
    """What every collective gives where all ranks live."""
    return {
        "agree": int(world.agree([Wish.STOP, Wish.SAVE, Wish.ABORT][world.rank % 3])),
        "none": int(world.agree(Wish.NONE)),
        "object": world.broadcast_object({"from": world.rank}, src=world.size - 1),
        "sum": world.all_reduce_sum(torch.full((2,), float(world.rank + 1))).tolist(),
        "main": world.is_main,
    }


def rounds(world, name, mishap):
    collective = collectives(world)[name]
    for number in range(10_000):
        if number == 10 and world.rank == world.size - 1:
            if mishap == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if mishap == "sleep":
                time.sleep(60)
        collective()


def main():
    rank, size, folder, name, mishap, timeout = sys.argv[1:]
    torch.set_num_threads(1)
    attempt = Run(folder).newest()
    place = Place(int(rank), int(size), int(rank), int(size), 0, 1, "1", "single")
    began = time.monotonic()
    try:
        world = World.join(
            place,
            publish=attempt.publish,
            find=attempt.find,
            device=torch.device("cpu"),
            timeout_s=float(timeout),
        )
        if name == "values":
            say(**values(world))
            world.barrier()
            world.leave()
            return
        began = time.monotonic()
        rounds(world, name, mishap)
    except (LostPeers, RuntimeError) as error:
        lost = is_lost_peer(error)
        say(lost=lost, kind=type(error).__name__, seconds=time.monotonic() - began, at=time.time())
        os._exit(0 if lost else 3)


if __name__ == "__main__":
    main()
