"""A launch that is recorded: its intent before, the job or the refusal after it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clipcluster.errors import UserError
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs.folder import Run
from jobs import submissions
from jobs.state import Queue
from jobs.submit import launch
from jobs.submit.parameters import Array

if TYPE_CHECKING:
    from jobs.submit.prepared import Prepared


def launched(
    run: Run,
    cluster: Cluster,
    code: Path,
    executor: str,
    *,
    grace: float,
    trainee: str,
    say: Callable[[str], None],
    used: Callable[[int], int] = lambda granted: granted,
    evaluations: bool = False,
    dependency: str = "",
) -> str:
    """Launch the run's job on "slurm" or "local", as `jobs.submit.launch` says; returns the job's id.

    Raises UserError where SLURM refuses, and NoAnswer where the job may exist all the same.
    """
    intent = submissions.intend(run, executor, code.name)
    try:
        if executor == "local":
            job = launch.locally(cluster, run, code, grace=grace, trainee=trainee, evaluations=evaluations)
        else:
            job = launch.on_slurm(
                cluster,
                run,
                code,
                grace=grace,
                trainee=trainee,
                used=used,
                evaluations=evaluations,
                dependency=dependency,
            )
    except launch.NoAnswer as silence:
        found = Queue().jobs_of(run, intent)
        if not found:
            raise launch.NoAnswer(
                f"{run.name}: {silence}. Whether the job was accepted is not known: submit the run again "
                "in a minute, which finds the job or queues a new one."
            ) from None
        job = found[-1]
    except UserError as refusal:
        submissions.record(run, intent, refused=str(refusal))
        raise
    except BaseException:
        for job in Queue().jobs_of(run, intent)[-1:] if executor == "slurm" else []:
            submissions.record(run, intent, job=job)
            say(f"{run.name} is queued, as job {job}; to end it: clipcluster cancel {run.name}")
        raise
    submissions.record(run, intent, job=job)
    return job


def launched_array(
    members: Sequence[Prepared],
    array: Array,
    *,
    trainee: str,
    say: Callable[[str], None],
    dependency: str = "",
) -> list[str]:
    """Launch runs whose jobs ask for the same as one array on SLURM; returns their jobs' ids, in order.

    The array's comment ends with a token by which the job of each is found again. Errors as of `launched`.
    """
    array = replace(array, comment=f"{array.comment}#{secrets.token_hex(4)}")
    intents = [
        submissions.intend(member.run, "slurm", member.code.name, comment=array.comment, task=task)
        for task, member in enumerate(members)
    ]
    first = members[0]
    try:
        jobs = launch.array_on_slurm(
            first.recipe.cluster,
            [(member.run, member.code) for member in members],
            array,
            grace=first.grace,
            trainee=trainee,
            used=first.used,
            evaluations=first.recipe.evaluate.where == "job",
            dependency=dependency,
        )
    except launch.NoAnswer as silence:
        jobs = _found(members, intents)
        if not jobs:
            raise launch.NoAnswer(
                f"{array.name}: {silence}. Whether the jobs were accepted is not known: submit the sweep "
                "again in a minute, which finds the jobs or queues new ones."
            ) from None
    except UserError as refusal:
        for member, intent in zip(members, intents, strict=True):
            submissions.record(member.run, intent, refused=str(refusal))
        raise
    except BaseException:
        for member, intent, job in zip(members, intents, _found(members, intents), strict=False):
            submissions.record(member.run, intent, job=job)
            say(f"{member.run.name} is queued, as job {job}; to end all: clipcluster cancel {array.name}")
        raise
    for member, intent, job in zip(members, intents, jobs, strict=True):
        submissions.record(member.run, intent, job=job)
    return jobs


def _found(members: Sequence[Prepared], intents: Sequence[submissions.Intent]) -> list[str]:
    """The jobs of an array's members that SLURM shows; none where not all are there."""
    queue = Queue()
    pairs = zip(members, intents, strict=True)
    found = [job for member, intent in pairs for job in queue.jobs_of(member.run, intent)[-1:]]
    return found if len(found) == len(members) else []
