"""How this process was launched: its rank among how many, and by whom. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from clipcluster.errors import UserError
from clipcluster.runtime.job_id import local_job_id, slurm_job_id

Manager = Literal["slurm", "local", "torchrun", "single"]


@dataclass(frozen=True)
class Launch:
    """One process of `size`: its rank, its node among `nodes`, and who started it.

    `job_id` is what the manager calls the job; a member of a SLURM array is "ARRAYJOB_TASK".
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    node: int
    nodes: int
    job_id: str
    manager: Manager

    @staticmethod
    def from_environment(environ: Mapping[str, str] | None = None) -> Launch:
        """Ask the innermost manager: torchrun, submitit's local executor, a SLURM step, or none.

        A shell inside `salloc` or a batch script carries SLURM_* too, but no step started this process there:
        a step is known by SLURM_PROCID together with SLURM_STEP_ID.

        Raises UserError where a manager's variables are incomplete or contradict each other.
        """
        environ = os.environ if environ is None else environ
        if "RANK" in environ and "WORLD_SIZE" in environ:
            launch = _torchrun(environ)
        elif "SUBMITIT_LOCAL_GLOBALID" in environ:
            launch = _local(environ)
        elif all(name in environ for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_ID")):
            # `srun --pty bash` sets them too; its processes are real tasks of that step.
            launch = _slurm(environ)
        else:
            launch = Launch(0, 1, 0, 1, 0, 1, local_job_id(), "single")
        if not 0 <= launch.rank < launch.size or not 0 <= launch.local_rank < launch.local_size:
            raise UserError(
                f"The environment says rank {launch.rank} of {launch.size} "
                f"(local {launch.local_rank} of {launch.local_size}), as set by {launch.manager}: "
                "ranks run from 0 to the size less one. Unset the variables of an outer launcher."
            )
        return launch


def whole_number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The number in an environment variable. Raises UserError where it is missing or none."""
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        given = "is not set" if text is None else f"is {text!r}"
        raise UserError(f"The environment variable {name} {given}; it must be a whole number here.") from None


def _slurm(environ: Mapping[str, str]) -> Launch:
    node = whole_number(environ, "SLURM_NODEID", 0)
    size = whole_number(environ, "SLURM_STEP_NUM_TASKS", whole_number(environ, "SLURM_NTASKS", 1))
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(size)
    return Launch(
        rank=whole_number(environ, "SLURM_PROCID"),
        size=size,
        local_rank=whole_number(environ, "SLURM_LOCALID", 0),
        local_size=_tasks_of_node(per_node, node),
        node=node,
        nodes=whole_number(environ, "SLURM_STEP_NUM_NODES", whole_number(environ, "SLURM_JOB_NUM_NODES", 1)),
        job_id=slurm_job_id(environ),
        manager="slurm",
    )


def _tasks_of_node(text: str, node: int) -> int:
    """Tasks on node number `node` from SLURM's short form, for example "2(x3),1"."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[min(node, len(counts) - 1)]


def _local(environ: Mapping[str, str]) -> Launch:
    size = whole_number(environ, "SUBMITIT_LOCAL_NTASKS", 1)
    return Launch(
        rank=whole_number(environ, "SUBMITIT_LOCAL_GLOBALID"),
        size=size,
        local_rank=whole_number(environ, "SUBMITIT_LOCAL_LOCALID", 0),
        local_size=size,
        node=0,
        nodes=1,
        job_id=environ.get("SUBMITIT_LOCAL_JOB_ID", ""),
        manager="local",
    )


def _torchrun(environ: Mapping[str, str]) -> Launch:
    size = whole_number(environ, "WORLD_SIZE")
    local_size = whole_number(environ, "LOCAL_WORLD_SIZE", size)
    return Launch(
        rank=whole_number(environ, "RANK"),
        size=size,
        local_rank=whole_number(environ, "LOCAL_RANK", 0),
        local_size=local_size,
        node=whole_number(environ, "GROUP_RANK", 0),
        nodes=whole_number(environ, "GROUP_WORLD_SIZE", max(1, size // local_size)),
        job_id=local_job_id(),
        manager="torchrun",
    )
