"""The section `cluster`: where a run lives on a cluster. No torch."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator

from clipcluster.recipe.sections.base import Section, key
from clipcluster.recipe.sections.values import Int
from clipcluster.recipe.units import Memory, Nodes, Time

NumberAsText = Annotated[str, Field(coerce_numbers_to_str=True)]


class Cluster(Section):
    """Where the run takes place. A site profile may set all of it; recipe and command line override it."""

    nodes: Nodes = key("record", "Nodes: a count (2) or a range (2-4).", "1")
    gpus_per_node: Int = key("record", "GPUs of each node; 0 trains on the CPU.", 1, ge=0)
    tasks_per_node: Int | None = key(
        "record", "Ranks of each node. Default: one per GPU, or 1 without GPUs.", None, ge=1
    )
    gpu_memory: Memory | None = key(
        "record",
        "Memory of each GPU, with which the check compares what a step takes. Default: that of the type "
        "which SLURM names, such as a100.",
        None,
    )
    cpus_per_task: Int = key("record", "CPU cores of each rank.", 4, ge=1)
    mem: Memory | None = key("record", "Memory of each node. Default: the partition's own.", None)
    time: Time = key("record", "Time limit of one attempt; a longer run is requeued and resumes.", "4 h")
    grace: Time | None = key(
        "record",
        "Time between the signal and the kill at a preemption. Default: as SLURM is configured, else 30 s.",
        None,
    )
    partition: str | None = key("record", "SLURM partition.", None)
    account: str | None = key("record", "SLURM account.", None)
    qos: str | None = key("record", "SLURM quality of service.", None)
    constraint: str | None = key("record", "SLURM node features, such as a100|h100.", None)
    interface: str | None = key(
        "record", "Network interface of the ranks' rendezvous on several nodes.", None
    )
    setup: tuple[str, ...] = key(
        "record", "Shell commands that the job runs first (modules, an environment).", (), shell=True
    )
    environment: dict[str, NumberAsText] = key("record", "Environment variables of the job.", {})

    @field_validator("environment")
    @classmethod
    def _named_as_in_a_shell(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} cannot name a variable: allowed are letters, digits and _")
        return value

    @property
    def ranks_per_node(self) -> int:
        """Ranks of each node: `tasks_per_node`, else one a GPU, else 1."""
        return self.tasks_per_node or max(1, self.gpus_per_node)
