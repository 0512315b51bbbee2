"""The recipe's cluster section as submitit's parameters: flags of sbatch and srun, lines of the batch script.

The batch script is submitit's own: `setup` before srun, `teardown` after it. Arrays run one script for all
their members, so folders are looked up by the member's number.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runtime.environment import ATTEMPT, INTERFACE, LEAD, LOGS
from clipcluster.runtime.stop import GRACE_SECONDS
from jobs.endings.local import PICKLE
from tools.slurm import Partition, Slurm, SlurmRefused, SlurmUnavailable

TRAINEE = "clipcluster.run:train"


@dataclass(frozen=True)
class Member:
    """One run of a job: its folder, and the folder of the code it will execute; both absolute."""

    run_dir: Path
    code: Path


def grace_seconds(cluster: Cluster, slurm: Slurm | None) -> int:
    """Seconds from the signal of a preemption to the kill.

    The recipe's, else the smaller of the partition's GraceTime and KillWait where SLURM tells them (a
    GraceTime of 0 leaves KillWait), else 30.
    """
    if cluster.grace is not None:
        return int(cluster.grace.seconds)
    if slurm is None:
        return GRACE_SECONDS
    try:
        wait = slurm.kill_wait()
        partition = _partition(slurm.partitions(), cluster.partition)
    except (SlurmUnavailable, SlurmRefused, KeyError):
        return GRACE_SECONDS
    grace = partition.grace_seconds if partition else 0
    return max(1, min(grace, wait) if grace else wait)


def _partition(partitions: Sequence[Partition], name: str | None) -> Partition | None:
    first = (name or "").split(",")[0]
    fitting = [part for part in partitions if (part.name == first if first else part.default)]
    return fitting[0] if fitting else None


def lead_seconds(time_seconds: float, grace: float) -> int:
    """How long before its time limit an attempt is asked to stop: two saves, each of which fits the grace.

    At least a minute, because SLURM keeps limits by the minute; never more than a third of the time.
    """
    return int(max(1, min(max(60, 2 * grace), time_seconds / 3)))


def parameters(
    cluster: Cluster,
    members: Sequence[Member],
    *,
    name: str,
    logs: Path,
    grace: float,
    used: Callable[[int], int] = lambda granted: granted,
) -> dict[str, Any]:
    """Parameters for submitit's SlurmExecutor: one job, or an array with a member for each run.

    `used`: of a range of nodes SLURM grants some, of which so many take part; the rest idle.
    """
    lead = lead_seconds(cluster.time.minutes * 60, grace)
    extra: dict[str, Any] = {"requeue": True, "signal": f"USR1@{lead}"}
    if cluster.nodes.least != cluster.nodes.most:
        extra["nodes"] = str(cluster.nodes)
    chosen = {
        "job_name": name,
        # by name and comment a job is found whose submitter died before it learned the job's id
        "comment": str(members[0].run_dir) if len(members) == 1 else None,
        "time": cluster.time.minutes,
        "nodes": cluster.nodes.most,
        "ntasks_per_node": cluster.ranks_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": cluster.gpus_per_node or None,
        "mem": f"{cluster.mem.megabytes}M" if cluster.mem else None,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "setup": setup_lines(cluster, members, logs=logs, lead=lead, used=used),
        "teardown": teardown_lines(),
        # srun no longer takes --cpus-per-task from sbatch (Slurm 22.05)
        "srun_args": [
            "--kill-on-bad-exit=1",
            "--open-mode=append",
            f"--cpus-per-task={cluster.cpus_per_task}",
        ],
        "additional_parameters": extra,
    }
    return {key: value for key, value in chosen.items() if value is not None}


def setup_lines(
    cluster: Cluster,
    members: Sequence[Member],
    *,
    logs: Path,
    lead: int,
    used: Callable[[int], int] = lambda granted: granted,
) -> list[str]:
    """What the batch script does before srun: the site's lines, the snapshot, the claim."""
    runs = " ".join(shlex.quote(str(member.run_dir)) for member in members)
    codes = " ".join(shlex.quote(str(member.code)) for member in members)
    member = "${SLURM_ARRAY_TASK_ID:-0}" if len(members) > 1 else "0"
    return [
        "trap : TERM  # outlive the ranks, so that the verdict is reached",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment(cluster).items()),
        *cluster.setup,
        f"runs=({runs})",
        f"codes=({codes})",
        f'run="${{runs[{member}]}}"',
        f'cd "${{codes[{member}]}}" || exit 1',
        'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"',
        f"export {LOGS}={shlex.quote(str(logs))} {LEAD}={lead}",
        'job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"',
        f'pickle="${LOGS}/${{job:-$SLURM_JOB_ID}}_submitted.pkl"',
        # submitit names it after sbatch: a submitter that dies in between leaves it without its name
        f'[ -e "$pickle" ] || cp "$run/submitit/{PICKLE}" "$pickle"',
        f'{ATTEMPT}="$({python()} -m jobs.endings claim "$run")" || exit',
        f'[ -n "${ATTEMPT}" ] || exit 0  # finished, or cancelled',
        f"export {ATTEMPT}",
        *_node_lines(cluster, used),
    ]


def _node_lines(cluster: Cluster, used: Callable[[int], int]) -> list[str]:
    """For a range of nodes: tell srun how many of the granted ones take part (it reads these variables)."""
    least, most = cluster.nodes.least, cluster.nodes.most
    if least == most:
        return []
    table = " ".join(f"[{granted}]={used(granted)}" for granted in range(least, most + 1))
    return [
        f"used=({table})",
        'export SLURM_NNODES="${used[$SLURM_JOB_NUM_NODES]}"',
        "export SLURM_JOB_NUM_NODES=$SLURM_NNODES",
        f"export SLURM_NTASKS=$((SLURM_NNODES * {cluster.ranks_per_node}))",
        "export SLURM_NPROCS=$SLURM_NTASKS",
    ]


def teardown_lines() -> list[str]:
    """What the batch script does after srun: the verdict, shielded from a scancel."""
    return [
        "rc=$?",
        "trap '' TERM INT  # children of bash get a trap reset, but what is ignored stays ignored",
        f'{python()} -m jobs.endings verdict "$run" "$rc"',
        "exit",
    ]


def environment(cluster: Cluster) -> dict[str, str]:
    """The job's variables: nodes may be offline, so nothing is looked for on a hub."""
    interface = {INTERFACE: cluster.interface} if cluster.interface else {}
    return {"HF_HUB_OFFLINE": "1", **interface, **cluster.environment}


def python() -> str:
    """The submitting environment's interpreter, quoted for the shell."""
    return shlex.quote(sys.executable)
