"""Which devices a run will train on, said and checked before it starts. No torch."""

from __future__ import annotations

from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runtime.accelerators import count_accelerators
from clipcluster.text import counted


def describe(cluster: Cluster, executor: str) -> str:
    """One line: the devices that the ranks will use on "slurm" or on this machine."""
    ranks = cluster.ranks_per_node
    each = counted(ranks, "rank")
    gpus = cluster.gpus_per_node
    if gpus == 0:
        return f"device: CPU, {each} per node (cluster.gpus_per_node is 0)"
    if executor == "slurm":
        return f"device: {counted(gpus, 'GPU')} per node, requested from SLURM, for {each} per node"
    here = count_accelerators()
    if here == 0:
        return f"device: CPU, {each} (this machine has no GPU)"
    used = min(here, gpus)
    return f"device: {used} of this machine's {counted(here, 'GPU')}, for {each}"


def missing(cluster: Cluster) -> str:
    """Why this machine cannot give the GPUs that were explicitly requested; empty where it can."""
    gpus = cluster.gpus_per_node
    if gpus == 0 or "gpus_per_node" not in cluster.model_fields_set:
        return ""
    here = count_accelerators()
    if here >= gpus:
        return ""
    has = f"only {here}" if here else "none"
    fewer = f"cluster.gpus_per_node={here} to use those it has, " if here else ""
    return (
        f"cluster.gpus_per_node: {gpus} requested, and this machine has {has}. Give {fewer}"
        "cluster.gpus_per_node=0 to train on the CPU, or submit where SLURM is"
    )
