"""Whether a training step fits into the memory of a device, as far as that is known. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipcluster.check.plain import Findings
from clipcluster.recipe.plan import memory_advice
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.text import sized

if TYPE_CHECKING:
    from tools.slurm import Node

GB = 1 << 30
TIGHT = 0.9  # of a device's memory; the driver and the allocator take some of it too
# By the names that sites give types of GPUs; of those that are made in several sizes the smallest.
GPU_GB = {
    **dict.fromkeys(("t4", "p100", "v100"), 16),
    **dict.fromkeys(("a10", "a10g", "a30", "l4", "rtx3090", "rtx4090"), 24),
    **dict.fromkeys(("a100", "a800"), 40),
    **dict.fromkeys(("a40", "a6000", "l40", "l40s"), 48),
    **dict.fromkeys(("mi210", "mi250", "mi250x"), 64),
    **dict.fromkeys(("a100x", "h100", "h800"), 80),
    **dict.fromkeys(("gh200", "h20"), 96),
    **dict.fromkeys(("h200",), 141),
    **dict.fromkeys(("b200",), 180),
    **dict.fromkeys(("mi300x",), 192),
}


@dataclass(frozen=True)
class Device:
    """The memory of what a rank trains on, in bytes; `certain`: it was given or measured, not guessed."""

    bytes: int
    source: str
    certain: bool


def gpu_bytes(kind: str) -> int | None:
    """Bytes of a GPU by the name of its type: `a100-80gb`, `3g.20gb`, `h200`; None where it says nothing."""
    sizes = re.findall(r"(\d+)\s*gb?(?![a-z0-9])", kind.lower())
    if sizes:
        return int(sizes[-1]) * GB
    words = re.split(r"[^a-z0-9]+", kind.lower())
    known = next((GPU_GB[word] for word in words if word in GPU_GB), None)
    return known * GB if known else None


def device_of(recipe: Recipe, nodes: Sequence[Node]) -> Device | None:
    """What a rank has: as the recipe says, else by the type of the GPUs of the nodes that it may run on."""
    cluster = recipe.cluster
    if cluster.gpus_per_node == 0:
        if cluster.mem is None:
            return None
        ranks = cluster.ranks_per_node
        return Device((cluster.mem.megabytes << 20) // ranks, "cluster.mem by the ranks of a node", True)
    if cluster.gpu_memory is not None:
        return Device(cluster.gpu_memory.megabytes << 20, "cluster.gpu_memory", True)
    kinds = {each.type for node in nodes for each in node.gpus}
    if cluster.gpu_type is not None:
        kinds = {cluster.gpu_type}
    sizes = {kind: gpu_bytes(kind) for kind in kinds}
    known = {kind: size for kind, size in sizes.items() if size}
    if not known or len(known) < len(sizes):
        return None
    smallest = min(known, key=lambda kind: known[kind])
    return Device(known[smallest], f"a GPU of type {smallest}", False)


def compare(recipe: Recipe, world_size: int, parts: Mapping[str, int], device: Device | None) -> Findings:
    """The findings about the estimate of a step: its parts in bytes on each device, by name."""
    found, needed = Findings(), sum(parts.values())
    listed = ", ".join(f"{name} {sized(size)}" for name, size in parts.items() if size >= 1 << 20)
    text = f"about {sized(needed)} a rank" + (f" ({listed})" if listed else "")
    has = f", of {sized(device.bytes)} ({device.source})" if device else ""
    if device is None or needed <= TIGHT * device.bytes:
        found.summary.append(f"memory: {text}{has}")
        return found
    wrong = f"train.micro_batch: a step needs {text}{has}. {memory_advice(recipe, world_size)}"
    (found.errors if device.certain and needed > device.bytes else found.warnings).append(wrong)
    return found
