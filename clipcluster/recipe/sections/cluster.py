"""The section `cluster`: where a run lives on a cluster. No torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from clipcluster.recipe.sections.base import Section, key, section
from clipcluster.recipe.sections.values import Int
from clipcluster.recipe.units import Memory, Nodes, Time

NumberAsText = Annotated[str, Field(coerce_numbers_to_str=True)]


class Container(Section):
    """The image in which the ranks run. Claim, verdict and requeue are the batch script's, outside of it."""

    runtime: Literal["apptainer", "pyxis"] = key(
        "record", "What runs the image: apptainer exec, or srun with the plugin pyxis."
    )
    image: str = key(
        "record", "The image: a file, or an address that the runtime knows.", path="name", min_length=1
    )
    python: str = key("record", "The Python of the image that has torch.", "python3", min_length=1)
    mounts: tuple[str, ...] = key(
        "record",
        "Folders of the nodes that are visible in it: /FOLDER, or /FOLDER:/INSIDE[:ro]. The run's own is.",
        (),
    )
    arguments: tuple[str, ...] = key(
        "record", "Further arguments of apptainer exec (--rocm), or pyxis's of srun.", ()
    )

    @field_validator("mounts")
    @classmethod
    def _absolute(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for mount in value:
            if not re.fullmatch(r"/[^:,]*(:/[^:,]*(:[^:,]+)?)?", mount):
                raise ValueError(f"{mount!r} should be /FOLDER or /FOLDER:/INSIDE[:FLAGS], without a comma")
        return value

    @field_validator("arguments")
    @classmethod
    def _with_variables(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for word in value:
            if word in ("-e", "--cleanenv", "-C", "--containall"):
                raise ValueError(f"{word} takes away SLURM's variables, without which ranks know nothing")
        return value


class Cluster(Section):
    """Where the run takes place. A site profile may set all of it; recipe and command line override it."""

    nodes: Nodes = key("record", "Nodes: a count (2) or a range (2-4).", "1")
    gpus_per_node: Int = key("record", "GPUs of each node; 0 trains on the CPU.", 1, ge=0)
    gpu_type: str | None = key(
        "record", "Type of the GPUs: a100 where sinfo's GRES says gpu:a100:8. Default: any.", None
    )
    gpus_by: Literal["gpus-per-node", "gres"] = key(
        "record", "The option of sbatch that asks for GPUs; some sites know --gres alone.", "gpus-per-node"
    )
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
    exclusive: bool = key("record", "Share the nodes with no other job.", False)
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
    reservation: str | None = key("record", "SLURM reservation.", None)
    interface: str | None = key(
        "record", "Network interface of the ranks' rendezvous on several nodes.", None
    )
    setup: tuple[str, ...] = key(
        "record", "Shell commands that the job runs first (modules, an environment).", (), shell=True
    )
    environment: dict[str, NumberAsText] = key("record", "Environment variables of the job.", {})
    container: Container | None = section("The image in which the ranks run.", None)

    @field_validator("gpu_type")
    @classmethod
    def _a_word(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", value):
            raise ValueError("should be the type alone, such as a100; their number is gpus_per_node")
        return value

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
