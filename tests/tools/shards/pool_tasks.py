"""Tasks for the pool's workers, which import them by name."""

import os
import signal
import time


def lengths(shards, shard, lost, at):
    """Bytes of every image; one called `crash` kills the process, one called `hang` stays."""
    found = []
    first = int(shards.sample_counts[:shard].sum())
    for position in range(first, first + int(shards.sample_counts[shard])):
        sample = shards.read(position)
        at(position)
        if position in lost:
            found.append(lost[position])
            continue
        if sample.key.startswith("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if sample.key.startswith("hang"):
            time.sleep(60)
        found.append(len(sample.image))
    at(-1)
    return found


def refuses(shards, shard, lost, at):
    raise OSError(5, f"the disk under shard {shard} fails")


def dies(shards, shard, lost, at):
    os._exit(3)


def dies_twice(shards, shard, lost, at):
    """Touches a sample that it was told not to touch."""
    at(0)
    os.kill(os.getpid(), signal.SIGSEGV)
