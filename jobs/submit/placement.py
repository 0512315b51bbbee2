"""Where on the cluster a run goes: its section `cluster` against what SLURM has, and when it would start."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipcluster.check.plain import Checked
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs.folder import Run
from jobs.check import cluster as asked
from jobs.check.known import ASK_SECONDS, Known, ask
from jobs.submit import launch, parameters
from tools.slurm import Node, Partition, Slurm, SlurmRefused, SlurmUnavailable, kill_wait_of

# What sbatch takes from the environment rather than from the batch script -> the key of `cluster`; None: no
# key, but of what a submission sets: a job is found by its name, and its verdict rests on its log.
OVERRIDING = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_RESERVATION": "reservation",
    **dict.fromkeys(("SBATCH_TIMELIMIT", "SBATCH_NO_REQUEUE", "SBATCH_SIGNAL", "SBATCH_ARRAY_INX")),
    **dict.fromkeys(("SBATCH_GPUS_PER_NODE", "SBATCH_MEM_PER_NODE", "SBATCH_EXCLUSIVE", "SBATCH_OPEN_MODE")),
    **dict.fromkeys(("SBATCH_JOB_NAME", "SBATCH_OUTPUT", "SBATCH_ERROR", "SBATCH_CLUSTERS", "SBATCH_WAIT")),
    **dict.fromkeys(("SBATCH_GPUS", "SBATCH_GRES", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU")),
    "SBATCH_EXPORT": None,
}


@dataclass(frozen=True)
class Placed:
    """What is known of the place: `partition` and `nodes` are those that the job is likely to get.

    grace: seconds from the signal of a preemption to the kill.
    """

    known: Known
    partition: Partition | None
    nodes: Sequence[Node]
    grace: float


def compare(checked: Checked, run: Run) -> Placed:
    """Add what the cluster says of the job of a run, and whether sbatch would take it."""
    cluster, said = of_environment(checked.recipe.cluster, os.environ)
    checked.warnings += said
    with launch.outside_of_jobs():
        slurm = Slurm(timeout=ASK_SECONDS)
    known = ask(slurm)
    found = asked.compare(cluster, known, checked.loaded.place)
    checked.add(found)
    if names := launch.inherited():
        checked.summary.append(f"environment: left out of the job: {', '.join(names)}")
    if known.config is None or known.partitions is None:
        return Placed(known, None, (), parameters.grace_seconds(cluster, None))
    try:
        grace = parameters.grace_of(cluster, kill_wait_of(known.config), known.partitions)
    except ValueError:
        checked.unchecked.append("cluster.grace (SLURM tells no KillWait in seconds)")
        grace = parameters.grace_seconds(cluster, None)
    if not found.errors:
        _expected_start(checked, cluster, run, slurm, grace, waits=bool(found.warnings))
    partition = asked.partition_of(cluster, known)
    nodes = asked.fitting_nodes(cluster, partition, known) if partition else ()
    return Placed(known, partition, nodes, grace)


def of_environment(cluster: Cluster, environ: Mapping[str, str]) -> tuple[Cluster, list[str]]:
    """The section as sbatch will see it, and a warning for each variable that it prefers to the recipe.

    Inside a job these variables are left out.
    """
    if "SLURM_JOB_ID" in environ:
        return cluster, []
    given = {name: key for name, key in OVERRIDING.items() if environ.get(name)}
    said = [
        f"cluster.{key}: sbatch takes {name}={environ[name]} of the environment instead; unset {name}"
        if key
        else f"environment: sbatch takes {name}={environ[name]} instead of what is submitted; unset {name}"
        for name, key in given.items()
        if key is None or getattr(cluster, key) not in (None, environ[name])
    ]
    return cluster.model_copy(update={key: environ[name] for name, key in given.items() if key}), said


def _expected_start(
    checked: Checked, cluster: Cluster, run: Run, slurm: Slurm, grace: float, *, waits: bool
) -> None:
    """When the job would start, or why SLURM would refuse it; `waits`: it is known not to start for now."""
    flags = parameters.of_run(cluster, run, run.path / "code", grace=grace)
    try:
        start = slurm.expected_start(*sbatch_arguments(flags))
    except SlurmRefused as refusal:
        if waits:  # sbatch takes such a job, although its test cannot place it
            checked.unchecked.append(f"expected start ({refusal})")
        else:
            checked.errors.append(f"sbatch would refuse the job: {refusal}; change the section cluster")
    except SlurmUnavailable as silence:
        checked.unchecked.append(f"expected start ({silence})")
    else:
        if start is None:
            return
        checked.figures["expected_start"] = start.time.isoformat()
        where = f" on {', '.join(start.nodes)}" if start.nodes else ""
        checked.summary.append(f"start: expected {start.time:%Y-%m-%d %H:%M}{where}, by the queue as it is")


def sbatch_arguments(flags: Mapping[str, Any]) -> list[str]:
    """Parameters for submitit as options of sbatch, without what the script and srun are given."""
    plain = {key: value for key, value in flags.items() if not isinstance(value, list | dict)}
    options = {**plain, **flags.get("additional_parameters", {})}
    return [
        f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
        for key, value in options.items()
    ]
