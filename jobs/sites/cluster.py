"""A cluster as a site profile needs it: what SLURM says of it, and what its login node has."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass

from clipcluster.errors import UserError
from jobs.check import known
from jobs.check.known import Known
from jobs.sites.node import interfaces
from tools.slurm import Node, Partition, Slurm


@dataclass(frozen=True)
class Kind:
    """Nodes that are alike: how many there are, and one of them."""

    count: int
    node: Node


@dataclass(frozen=True)
class Seen:
    """What SLURM says to this user, and what is on this machine.

    `interfaces` are its networks, `modules` what is loaded, `runtimes` the container runtimes found.
    """

    known: Known
    interfaces: tuple[str, ...]
    modules: tuple[str, ...]
    runtimes: tuple[str, ...]

    @property
    def partitions(self) -> list[Partition]:
        """All that this user is shown; there is at least one."""
        return self.known.partitions or []

    def setting(self, name: str, default: str = "?") -> str:
        """A setting of the cluster, as `scontrol show config` has it."""
        return (self.known.config or {}).get(name, default)

    def partition(self, name: str | None) -> Partition:
        """The partition of this name; without a name the default one, else the first that is up.

        Raises UserError where there is none.
        """
        by_name = {part.name: part for part in self.partitions}
        if name is not None and name not in by_name:
            raise UserError(f"--partition {name}: this cluster has {', '.join(by_name)}")
        if name is not None:
            return by_name[name]
        up = [part for part in self.partitions if part.state == "UP"] or self.partitions
        return next((part for part in up if part.default), up[0])

    def kinds(self, partition: Partition) -> list[Kind]:
        """The kinds of nodes of a partition, those with GPUs first, the most frequent first."""
        nodes = [node for node in self.known.nodes or () if partition.name in node.partitions]
        alike = Counter(map(_hardware, nodes))
        one_of = {_hardware(node): node for node in reversed(nodes)}
        found = [Kind(count, one_of[what]) for what, count in alike.most_common()]
        return sorted(found, key=lambda kind: kind.node.gpu_count == 0)


def _hardware(node: Node) -> tuple[object, ...]:
    return node.cpus, node.memory_mb, node.gpus, node.features


def ask(slurm: Slurm) -> Seen:
    """Ask the cluster. Raises UserError where it does not say what its partitions are."""
    answers = known.ask(slurm)
    if answers.partitions is None:
        raise UserError(f"SLURM does not describe its cluster: {answers.silent['partitions']}")
    found = {"apptainer": shutil.which("apptainer") is not None, "pyxis": answers.pyxis}
    return Seen(
        known=answers,
        interfaces=tuple(interfaces()),
        modules=tuple(filter(None, os.environ.get("LOADEDMODULES", "").split(":"))),
        runtimes=tuple(name for name, here in found.items() if here),
    )
