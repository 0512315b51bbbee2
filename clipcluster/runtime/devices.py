"""The device of a rank, its threads, and randomness without a state to save."""

from __future__ import annotations

import hashlib

import torch

from clipcluster.errors import UserError


def pick_device(local_rank: int) -> torch.device:
    """The GPU of this rank, made current, or the CPU where no GPU is visible.

    A rank that sees one GPU alone takes it (SLURM may bind one to each task). Raises UserError where a node
    has more ranks than GPUs.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return torch.device("cpu")
    if local_rank >= count > 1:
        raise UserError(
            f"cluster: rank {local_rank} of this node finds {count} GPUs; a GPU serves one rank. "
            f"Set cluster.tasks_per_node to {count}, or ask for more GPUs."
        )
    device = torch.device("cuda", local_rank if count > 1 else 0)
    torch.cuda.set_device(device)
    return device


def set_threads(number: int) -> None:
    """Let torch's operators on the CPU use `number` threads (at least 1).

    A restart with the same number gives the same bits.
    """
    torch.set_num_threads(max(1, number))


def step_seed(seed: int, step: int, slot: int) -> int:
    """A 63-bit hash of (seed, step, slot), the same on every machine."""
    text = f"{seed}/{step}/{slot}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seed_step(seed: int, step: int, slot: int) -> None:
    """Seed torch's generators, CPU and CUDA, for one micro-batch.

    `slot` is the place of the micro-batch's first sample in the global batch. Dropout and drop path draw from
    here, so that no random state exists between steps and none is saved.
    """
    torch.manual_seed(step_seed(seed, step, slot))
