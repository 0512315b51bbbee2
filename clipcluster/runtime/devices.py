"""The device of a rank, its threads and kernels, and randomness without a state to save.

The only file that names a kind of accelerator: everywhere else a `torch.device` is passed on.
"""

from __future__ import annotations

import hashlib
import os

import torch
import torch.distributed as dist

from clipcluster.errors import UserError
from clipcluster.text import counted

# Apple's has no float64, in which metrics and norms are summed: such a machine trains on its CPU.
_WITHOUT_FLOAT64 = {"mps"}


def count_devices() -> int:
    """The accelerators that this process sees and can train on."""
    if not torch.accelerator.is_available() or _kind() in _WITHOUT_FLOAT64:
        return 0
    return torch.accelerator.device_count()


def _kind() -> str:
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator else "cpu"


def pick_device(local_rank: int, *, per_node: int | None = None, required: bool = False) -> torch.device:
    """The accelerator of this rank, made current, or the CPU where none is visible.

    A rank that sees one accelerator alone takes it (SLURM may bind one to each task). `per_node` is
    cluster.gpus_per_node: 0 takes the CPU; with `required` any other number needs an accelerator here.
    Raises UserError where a node has more ranks than accelerators, or lacks a required one.
    """
    count = 0 if per_node == 0 else count_devices()
    if count == 0:
        if required and per_node:
            raise UserError(
                f"cluster.gpus_per_node is {per_node}, and torch {torch.__version__} finds no GPU on this "
                "node. Check the node's driver and that torch is a build for it, or set "
                "cluster.gpus_per_node=0 to train on the CPU."
            )
        return torch.device("cpu")
    if local_rank >= count > 1:
        raise UserError(
            f"cluster: rank {local_rank} of this node finds {count} GPUs; a GPU serves one rank. "
            f"Set cluster.tasks_per_node to {count}, or ask for more GPUs."
        )
    device = torch.device(_kind(), local_rank if count > 1 else 0)
    torch.accelerator.set_device_index(device.index)
    return device


def describe(device: torch.device) -> str:
    """The device as a person knows it: "cuda:1 (NVIDIA H200)", "cpu (4 threads)"."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({counted(threads, 'thread')})"
    module = torch.get_device_module(device)
    return f"{device} ({module.get_device_name(device)})"


def backends(device: torch.device) -> str:
    """What torch.distributed is told to use: gloo for tensors on the CPU, the device's own for the others."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def choose_kernels(device: torch.device, deterministic: bool | None) -> bool:
    """Use kernels that give the same bits in every run, or the fastest ones; returns whether the former.

    `deterministic` is train.deterministic; None means on the CPU only, where it costs next to nothing. On an
    accelerator it takes convolutions without a search for the fastest, and of the attention kernels those
    whose backward adds up in a fixed order; an operation that has no such kernel raises RuntimeError.
    """
    on = device.type == "cpu" if deterministic is None else deterministic
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.set_deterministic_debug_mode("error" if on else "default")
    # By default it also fills every new tensor, against programs that read what they never wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = not on
    # flash (in half precision) and plain attention remain: both have a deterministic backward
    torch.backends.cuda.enable_mem_efficient_sdp(not on)
    torch.backends.cuda.enable_cudnn_sdp(not on)
    return on


def choose_float32(device: torch.device, *, tf32: bool) -> str:
    """Say what float32 products and convolutions on an accelerator compute with; returns `tf32` or `fp32`.

    TF32 has float32's range and ten bits of mantissa (NVIDIA, from Ampere on). On the CPU it is fp32 always.
    torch's own default is TF32 for convolutions alone; here both are what the recipe says.
    """
    if device.type == "cpu":
        return "fp32"
    # Not the newer `fp32_precision`: torch 2.15's compiler reads these, and raises once the other was set.
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    return "tf32" if tf32 else "fp32"


def usable_cores(local_size: int) -> int:
    """Cores for each of a node's `local_size` ranks: those it is bound to, at most its part of them all."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(bound, max(1, (os.cpu_count() or 1) // local_size))


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
    """Seed torch's generators, of the CPU and of accelerators, for one micro-batch.

    `slot` is the number of the micro-batch's first sample in the global batch. Dropout and drop path draw
    from here, so that no random state exists between steps and none is saved.
    """
    torch.manual_seed(step_seed(seed, step, slot))
