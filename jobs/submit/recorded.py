"""A launch that is recorded: its intent before, the job or the refusal after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clipcluster.errors import UserError
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs.folder import Run
from jobs import submissions
from jobs.state import Queue
from jobs.submit import launch


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
                cluster, run, code, grace=grace, trainee=trainee, used=used, evaluations=evaluations
            )
    except launch.NoAnswer as silence:
        found = Queue().jobs_of(run)
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
        for job in Queue().jobs_of(run)[-1:] if executor == "slurm" else []:
            submissions.record(run, intent, job=job)
            say(f"{run.name} is queued, as job {job}; to end it: clipcluster cancel {run.name}")
        raise
    submissions.record(run, intent, job=job)
    return job
