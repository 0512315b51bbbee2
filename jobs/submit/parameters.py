"""The recipe's cluster section as submitit's parameters: flags of sbatch and srun, lines of the batch script.

The batch script is submitit's own: `setup` before srun, `teardown` after it. Arrays run one script for all
their members, so folders are looked up by the member's number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runtime.environment import ATTEMPT, INTERFACE, LEAD, LOGS
from clipcluster.runtime.stop import GRACE_SECONDS
from jobs.endings.local import PICKLE
from jobs.submit import script
from tools.slurm import Slurm, SlurmRefused, SlurmUnavailable

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
        partitions = slurm.partitions()
    except (SlurmUnavailable, SlurmRefused, KeyError):
        return GRACE_SECONDS
    name = (cluster.partition or "").split(",")[0]
    fitting = [part for part in partitions if (part.name == name if name else part.default)]
    grace = fitting[0].grace_seconds if fitting else 0
    return max(1, min(grace, wait) if grace else wait)


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
    return job(
        cluster,
        name=name,
        # by name and comment a job is found whose submitter died before it learned the job's id
        comment=str(members[0].run_dir) if len(members) == 1 else None,
        nodes=str(cluster.nodes),
        tasks=cluster.ranks_per_node,
        gpus=cluster.gpus_per_node,
        setup=_setup(cluster, members, logs=logs, lead=lead, used=used),
        signal=f"USR1@{lead}",
        srun_args=["--kill-on-bad-exit=1"],
    )


def job(
    cluster: Cluster,
    *,
    name: str,
    comment: str | None = None,
    nodes: str = "1",
    tasks: int = 1,
    gpus: int = 0,
    setup: Sequence[str],
    signal: str,
    srun_args: Sequence[str] = (),
) -> dict[str, Any]:
    """Parameters of a job whose batch script begins with the lines of `setup` (see `jobs.submit.script`).

    `nodes` may be a range ("2-4"); `tasks` and `gpus` are those of a node; `signal` ("USR1@60") is sent
    before the time limit.
    """
    chosen = {
        "job_name": name,
        "comment": comment,
        "time": cluster.time.minutes,
        "ntasks_per_node": tasks,
        "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": gpus or None,
        "mem": f"{cluster.mem.megabytes}M" if cluster.mem else None,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "setup": list(setup),
        "teardown": script.end(),
        # srun no longer takes --cpus-per-task from sbatch (Slurm 22.05)
        "srun_args": [*srun_args, "--open-mode=append", f"--cpus-per-task={cluster.cpus_per_task}"],
        "additional_parameters": {"requeue": True, "nodes": nodes, "signal": signal},
    }
    return {key: value for key, value in chosen.items() if value is not None}


def _setup(
    cluster: Cluster,
    members: Sequence[Member],
    *,
    logs: Path,
    lead: int,
    used: Callable[[int], int],
) -> list[str]:
    """What the batch script does before srun: the site's lines, the snapshot, the claim."""
    member = "${SLURM_ARRAY_TASK_ID:-0}" if len(members) > 1 else "0"
    return [
        *script.begin(script.python("-m", "jobs.endings", "verdict", '"$clipcluster_run"'), logs=logs),
        script.table("clipcluster_runs", [member.run_dir for member in members]),
        script.table("clipcluster_codes", [member.code for member in members]),
        f'clipcluster_run="${{clipcluster_runs[{member}]}}"',
        'clipcluster_marks="$clipcluster_run/marks"',
        *script.exports(environment(cluster)),
        *cluster.setup,
        *script.enter(f'"${{clipcluster_codes[{member}]}}"'),
        f"export {LEAD}={lead}",
        f'pickle="${LOGS}/${{clipcluster_job}}_submitted.pkl"',
        # submitit names it after sbatch: a submitter that dies in between leaves it without its name
        f'[ -e "$pickle" ] || cp "$clipcluster_run/submitit/{PICKLE}" "$pickle"',
        *script.claim('"$clipcluster_run"', ATTEMPT),
        *_node_lines(cluster, used),
        *script.ranks_begin(),
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


def environment(cluster: Cluster) -> dict[str, str]:
    """The job's variables: nodes may be offline, so nothing is looked for on a hub."""
    interface = {INTERFACE: cluster.interface} if cluster.interface else {}
    return {"HF_HUB_OFFLINE": "1", **interface, **cluster.environment}
