"""Starting runs: through submitit on SLURM, alone or as an array, and as a twin process on this machine."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs.folder import Run
from clipcluster.runtime.place import local_job_runs
from jobs.endings import local as twin
from jobs.submit import parameters as clusters
from jobs.submit import snapshot
from jobs.submit.parameters import TRAINEE, Member
from jobs.train import TrainJob

START_SECONDS = 30.0


def on_slurm(
    cluster: Cluster,
    members: Sequence[Member],
    *,
    name: str,
    logs: Path,
    grace: float,
    trainee: str = TRAINEE,
    used: Callable[[int], int] = lambda granted: granted,
) -> list[str]:
    """Submit one job, or an array with a member for each run; returns the job ids ("17", or "17_0", …).

    `logs` is the folder of submitit's files. Raises UserError with SLURM's own words where sbatch refuses.
    """
    parameters = clusters.parameters(cluster, members, name=name, logs=logs, grace=grace, used=used)
    return queue([TrainJob(str(member.run_dir), trainee) for member in members], parameters, logs)


def queue(jobs: Sequence[Callable[[], None]], parameters: Mapping[str, Any], logs: Path) -> list[str]:
    """Submit callables, several as one array, with submitit's parameters; returns the job ids.

    Raises UserError with SLURM's own words where sbatch refuses.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    with _outside_of_jobs():
        executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=0)
        executor.update_parameters(**parameters)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):  # submitit repeats there what a refusal says
                submitted = executor.submit_array(jobs) if len(jobs) > 1 else [executor.submit(jobs[0])]
        except FailedJobError as refusal:
            raise UserError(
                f"SLURM refused the job: {refusal}\n"
                "Change the cluster section, for example on the command line: cluster.partition=NAME (of a "
                "conversion: --cluster partition=NAME)"
            ) from None
    sys.stderr.write(said.getvalue())
    return [job.job_id for job in submitted]


def locally(cluster: Cluster, member: Member, *, grace: float, trainee: str = TRAINEE) -> str:
    """Start the twin in a session of its own; returns its job id ("local-HOST-PID-START").

    Raises UserError where it ends at once.
    """
    from submitit.core.utils import DelayedSubmission

    run = Run(member.run_dir)
    run.submitit.mkdir(exist_ok=True)
    DelayedSubmission(TrainJob(str(member.run_dir), trainee)).dump(run.submitit / twin.PICKLE)
    twin.Order(
        tasks=cluster.ranks_per_node,
        gpus=cluster.gpus_per_node,
        cpus_per_task=cluster.cpus_per_task,
        time=cluster.time.seconds,
        lead=clusters.lead_seconds(cluster.time.seconds, grace),
        grace=grace,
        environment=clusters.environment(cluster),
    ).write(run.submitit)
    log = run.submitit / "local.log"
    with _outside_of_jobs(), log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.endings", "local", str(member.run_dir)],
            cwd=member.code,
            env=snapshot.environment(member.code),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    return _await_claim(run, process, log)


def _await_claim(run: Run, process: subprocess.Popen[bytes], log: Path) -> str:
    """The twin's job id once it owns the run."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        newest = run.newest()
        job = (newest.job or "") if newest else ""
        if f"-{process.pid}-" in job and local_job_runs(job) is not None:
            return job
        if process.poll() is not None:
            said = "\n".join(log.read_text(errors="replace").splitlines()[-3:])
            raise UserError(f"the run could not be started on this machine:\n{said}\nSee {log}")
        time.sleep(0.05)
    raise UserError(f"the run did not start within {START_SECONDS:g} s; see {log}")


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide what an outer job or launcher told this process of itself; the user's own settings stay."""
    import submitit

    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or (name.startswith("SBATCH_") and "SLURM_JOB_ID" not in os.environ)
    }
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        try:
            yield
        finally:
            for name in kept:
                os.environ.pop(name, None)


def environment_has_slurm() -> bool:
    """Whether sbatch is on the PATH."""
    return any(
        os.access(os.path.join(folder, "sbatch"), os.X_OK)
        for folder in os.environ.get("PATH", os.defpath).split(os.pathsep)
    )
