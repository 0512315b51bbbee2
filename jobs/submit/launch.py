"""Launching jobs: through submitit on SLURM, and as a process on this machine."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs import files
from clipcluster.runs.folder import Run
from clipcluster.runs.timing import seconds_to_stop
from clipcluster.runtime.job_id import local_job_id, local_job_runs
from jobs.endings import local
from jobs.submit import containers, parameters, script, snapshot
from jobs.train import TRAINEE, TrainJob
from tools.slurm import SILENT

LOCAL_LOG = "local.log"  # what the process of a local run prints
START_SECONDS = 30.0  # how long a submission waits for the claim of a local run


class NoAnswer(UserError):
    """sbatch failed in a way that leaves open whether the job was accepted."""


def on_slurm(
    cluster: Cluster,
    run: Run,
    code: Path,
    *,
    grace: float,
    trainee: str = TRAINEE,
    used: Callable[[int], int] = lambda granted: granted,
    evaluations: bool = False,
    dependency: str = "",
) -> str:
    """Submit the job of a run that runs the code in `code`; returns its id.

    `evaluations`: its script starts what the training leaves to jobs of their own. `dependency`: what it
    waits for. Raises UserError with SLURM's own words where sbatch refuses, NoAnswer where it may have
    accepted.
    """
    job = _write_job(run, trainee)
    chosen = parameters.of_run(
        cluster, run, code, grace=grace, used=used, evaluations=evaluations, dependency=dependency
    )
    return queue([job], cluster, chosen, run.submitit)[0]


def array_on_slurm(
    cluster: Cluster,
    runs: Sequence[tuple[Run, Path]],
    array: parameters.Array,
    *,
    grace: float,
    trainee: str = TRAINEE,
    used: Callable[[int], int] = lambda granted: granted,
    evaluations: bool = False,
    dependency: str = "",
) -> list[str]:
    """Submit the jobs of several runs as one array; returns their ids. Arguments and errors as `on_slurm`."""
    jobs = [_write_job(run, trainee) for run, _ in runs]
    chosen = parameters.of_array(
        cluster, runs, array, grace=grace, used=used, evaluations=evaluations, dependency=dependency
    )
    return queue(jobs, cluster, chosen, array.logs)


def refuse_patterns(logs: Path) -> None:
    """UserError for a folder in whose path submitit or sbatch would replace %j and the like."""
    found = re.search(r"%\d*[a-zA-Z%]", os.path.abspath(logs))
    if found:
        raise UserError(
            f"{logs}: in the path of a job's files {found[0]} stands for something else, as %j for the job's "
            "id; give a folder without a % before a letter or a digit"
        )


def _write_job(run: Run, trainee: str) -> TrainJob:
    """Write the run's pickled job, from which a local run starts its ranks.

    A batch job takes it where its submitter died before submitit gave the pickle its name.
    """
    from submitit.core.utils import DelayedSubmission

    job, pickle = TrainJob(str(run.path), trainee), run.submitit / local.PICKLE
    protect(run.submitit)
    DelayedSubmission(job).dump(pickle)
    pickle.chmod(0o600)
    return job


def protect(folder: Path) -> None:
    """Make the folder of pickles, and let nobody but its owner change what is in it: a job executes them."""
    folder.mkdir(parents=True, exist_ok=True)
    mode = folder.stat().st_mode
    if mode & 0o022 and folder.stat().st_uid == os.getuid():
        folder.chmod(mode & ~0o022)


def queue(
    jobs: Sequence[Callable[[], None]], cluster: Cluster, chosen: Mapping[str, Any], logs: Path
) -> list[str]:
    """Submit callables, several as one array, with the `chosen` parameters; returns the job ids.

    Raises UserError with SLURM's own words where sbatch refuses, NoAnswer where it may have accepted.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    containers.refuse_folder(cluster, logs)
    python = containers.before_python(cluster, script.environment(cluster))
    protect(logs)
    with outside_of_jobs():
        executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=0, python=python)
        executor.update_parameters(**chosen)
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):  # submitit repeats there what a refusal says
                submitted = executor.submit_array(jobs) if len(jobs) > 1 else [executor.submit(jobs[0])]
        except FailedJobError as refusal:
            raise _refusal(refusal) from None
    sys.stderr.write(said.getvalue())
    for job in submitted:
        job.paths.submitted_pickle.chmod(0o600)
    return [job.job_id for job in submitted]


def _refusal(failure: Exception) -> UserError:
    """What a failed sbatch means: a refusal in SLURM's words, or nothing certain."""
    code = getattr(failure.__cause__, "returncode", None)
    text = str(failure)
    if code is None or code < 0 or any(sign in text.lower() for sign in SILENT):
        return NoAnswer(f"sbatch gave no answer ({text or f'code {code}'})")
    return UserError(
        f"SLURM refused the job: {text}\n"
        "Change the cluster section, for example on the command line: cluster.partition=NAME (of a "
        "conversion: --cluster partition=NAME)"
    )


def locally(
    cluster: Cluster,
    run: Run,
    code: Path,
    *,
    grace: float,
    trainee: str = TRAINEE,
    evaluations: bool = False,
) -> str:
    """Start the local supervisor; returns its job id ("local-HOST-PID-START").

    It lives on, in a session of its own, whatever becomes of this process. `evaluations` as in `on_slurm`.
    """
    _write_job(run, trainee)
    order = local.Order(
        tasks=cluster.ranks_per_node,
        gpus=cluster.gpus_per_node,
        cpus_per_task=cluster.cpus_per_task,
        time=cluster.time.seconds,
        lead=parameters.lead_seconds(cluster.time.seconds, grace, seconds_to_stop(run)),
        grace=grace,
        environment=script.environment(cluster),
        evaluations=evaluations,
    )
    files.write_json(run.submitit / local.ORDER, asdict(order))
    return local_job_id(detached(run.submitit, code, "jobs.endings", "local", str(run.path)))


def detached(logs: Path, code: Path, *module: str) -> int:
    """Start a module of the code in `code` in a session of its own, its output in LOCAL_LOG of `logs`.

    Returns its pid.
    """
    with outside_of_jobs(), (logs / LOCAL_LOG).open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=code,
            env=snapshot.environment(code),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    return process.pid


def await_claim(run: Run, job: str) -> bool:
    """Whether a local run's process claims the run within START_SECONDS. Raises UserError where it ends."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        lives = local_job_runs(job)
        newest = run.newest()
        if newest is not None and newest.job == job:
            return True
        if not lives:
            log = run.submitit / LOCAL_LOG
            said = "\n".join(log.read_text(errors="replace").splitlines()[-3:])
            raise UserError(f"the run could not be started on this machine:\n{said}\nSee {log}")
        time.sleep(0.05)
    return False


def inherited() -> list[str]:
    """The variables of an outer job or launcher that a job is not given, by name."""
    before = set(os.environ)
    with outside_of_jobs():
        return sorted(before - set(os.environ))


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hide what an outer job or launcher told this process of itself; the user's own settings stay."""
    import submitit

    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or (name.startswith("SBATCH_") and "SLURM_JOB_ID" not in os.environ)
    }
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield
