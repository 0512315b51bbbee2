"""The recipe's cluster section as submitit's parameters: flags of sbatch and srun, and the batch script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs.folder import Run
from clipcluster.runs.timing import seconds_to_stop
from clipcluster.runtime.stop import GRACE_SECONDS, MARGIN_SECONDS
from jobs.submit import script
from tools.slurm import Partition, Slurm, SlurmRefused, SlurmUnavailable


@dataclass(frozen=True)
class Array:
    """What an array of jobs is called, where submitit's files of it are, and how many may run at once."""

    name: str
    comment: str
    logs: Path
    parallel: int | None = None  # None: all


def grace_seconds(cluster: Cluster, slurm: Slurm | None) -> int:
    """Seconds from the signal of a preemption to the kill.

    The recipe's, else the smaller of the partition's GraceTime and KillWait where SLURM tells them (a
    GraceTime of 0 leaves KillWait; of several partitions the smallest counts), else 30.
    """
    if cluster.grace is not None:
        return int(cluster.grace.seconds)
    if slurm is None:
        return GRACE_SECONDS
    try:
        return grace_of(cluster, slurm.kill_wait(), slurm.partitions())
    except (SlurmUnavailable, SlurmRefused):
        return GRACE_SECONDS


def grace_of(cluster: Cluster, wait: int, partitions: Sequence[Partition]) -> int:
    """`grace_seconds` by the KillWait and the partitions that SLURM told."""
    if cluster.grace is not None:
        return int(cluster.grace.seconds)
    names = cluster.partition.split(",") if cluster.partition else None
    fitting = [part for part in partitions if (part.default if names is None else part.name in names)]
    return max(1, min([wait, *(part.grace_seconds for part in fitting if part.grace_seconds)]))


def lead_seconds(time_seconds: float, grace: float, measured: float = 0.0) -> int:
    """How long before its time limit an attempt is asked to stop: two steps and two saves.

    `measured`: how long they took in earlier attempts; 0.0 in the first one, where each save is taken to
    fit the grace. At least a minute, because SLURM keeps limits by the minute; never more than a third of the
    time.
    """
    needed = math.ceil(measured + MARGIN_SECONDS) if measured else 2 * grace
    return int(max(1, min(max(60, needed), time_seconds / 3)))


def of_run(
    cluster: Cluster,
    run: Run,
    code: Path,
    *,
    grace: float,
    used: Callable[[int], int] = lambda granted: granted,
    evaluations: bool = False,
    dependency: str = "",
) -> dict[str, Any]:
    """Parameters of a run's job, which runs the code in `code`; for the others see `script.of_runs`."""
    runs = [(run, code)]
    lead = _lead(cluster, runs, grace)
    setup = script.of_runs(
        cluster, runs, logs=run.submitit, lead=lead, grace=grace, used=used, evaluations=evaluations
    )
    return of_job(
        cluster, name=run.name, comment=str(run.path), setup=setup, lead=lead, dependency=dependency
    )


def of_array(
    cluster: Cluster,
    runs: Sequence[tuple[Run, Path]],
    array: Array,
    *,
    grace: float,
    used: Callable[[int], int] = lambda granted: granted,
    evaluations: bool = False,
    dependency: str = "",
) -> dict[str, Any]:
    """Parameters of an array of jobs, one for each run, which runs the code in the folder beside it."""
    lead = _lead(cluster, runs, grace)
    setup = script.of_runs(
        cluster, runs, logs=array.logs, lead=lead, grace=grace, used=used, evaluations=evaluations
    )
    job = of_job(
        cluster, name=array.name, comment=array.comment, setup=setup, lead=lead, dependency=dependency
    )
    return {**job, "array_parallelism": array.parallel or max(1, len(runs))}


def _lead(cluster: Cluster, runs: Sequence[tuple[Run, Path]], grace: float) -> int:
    """`lead_seconds` of one job for each run: the longest."""
    limit = cluster.time.minutes * 60
    leads = (lead_seconds(limit, grace, seconds_to_stop(run)) for run, _ in runs)
    return max(leads, default=lead_seconds(limit, grace))


def of_job(
    cluster: Cluster,
    *,
    name: str,
    comment: str,
    setup: Sequence[str],
    lead: int,
    dependency: str = "",
) -> dict[str, Any]:
    """Parameters of a job for submitit's SlurmExecutor.

    By name and comment, a folder, a job is found whose submitter died before it learned the job's id. `setup`
    is what the batch script does before srun (see `jobs.submit.script`); `lead` seconds before its time limit
    the ranks get USR1. `dependency`, as sbatch takes it: where it cannot be met any more, SLURM ends the job.
    """
    waits = {"dependency": dependency, "kill-on-invalid-dep": "yes"} if dependency else {}
    chosen = {
        "job_name": name,
        "comment": comment,
        "time": cluster.time.minutes,
        "ntasks_per_node": cluster.ranks_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        **_gpus(cluster),
        "mem": f"{cluster.mem.megabytes}M" if cluster.mem else None,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclusive": cluster.exclusive or None,
        "setup": list(setup),
        "teardown": script.TEARDOWN,
        # srun no longer takes --cpus-per-task from sbatch (Slurm 22.05)
        "srun_args": [
            "--kill-on-bad-exit=1",
            "--open-mode=append",
            f"--cpus-per-task={cluster.cpus_per_task}",
        ],
        "additional_parameters": {
            "requeue": True,
            "nodes": str(cluster.nodes),
            "signal": f"USR1@{lead}",
            **waits,
            **({"reservation": cluster.reservation} if cluster.reservation else {}),
        },
    }
    return {key: value for key, value in chosen.items() if value is not None}


def _gpus(cluster: Cluster) -> dict[str, str]:
    """How the GPUs are asked for: gpus-per-node=a100:8, or gres=gpu:a100:8."""
    if not cluster.gpus_per_node:
        return {}
    asked = f"{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else str(cluster.gpus_per_node)
    return {"gres": f"gpu:{asked}"} if cluster.gpus_by == "gres" else {"gpus_per_node": asked}
