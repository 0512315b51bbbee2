"""A conversion as an array of jobs: each task claims shards until none is left, the last one finishes.

    python -m jobs.convert CODE    CODE: srun's exit code; prints the batch script's

A shard's bytes do not depend on who writes it, so a task may be killed at any moment: its claims stay its own
when SLURM requeues it, and are dropped when the conversion is submitted again. `convert-jobs` in the output
folder holds the code the tasks run, their logs and their claims.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.recipe.units import Nodes
from clipcluster.runs import files
from clipcluster.runtime.environment import LOGS
from clipcluster.runtime.job_id import slurm_job_id
from clipcluster.runtime.outcome import Outcome, leave
from clipcluster.runtime.stop import Stop, Wish
from jobs.endings import facts
from jobs.endings.act import requeue
from jobs.endings.log import say
from jobs.endings.verdict import Facts, decide
from jobs.submit import launch, parameters, script, snapshot
from tools.convert import work as making
from tools.convert.convert import begun, prepare, sweep, told_to_people
from tools.convert.plan import Plan, Settings, Shard
from tools.slurm import Slurm, SlurmRefused, SlurmUnavailable

FOLDER = "convert-jobs"
JOB = "job.json"
LOG_FOLDER = "submitit"
_CLAIMS = "claims"
_FAILED = "failed"  # holds a file for each job that claimed shards and ended for good
_TIME_IS_UP = "SIGUSR1"
_LEAD_SECONDS = 60  # before the time limit: SLURM keeps limits by the minute
# Of the cluster section: a task is one process without torch, for which the Python of the submission will do.
_ONE_PROCESS = {
    "nodes": Nodes(1, 1),
    "tasks_per_node": 1,
    "gpus_per_node": 0,
    "exclusive": False,
    "container": None,
}


@dataclass(frozen=True)
class ConvertJob:
    """One task of a conversion's array. Pickled by reference, and restarted as it is after a requeue.

    What is converted is said as to `tools.convert.convert.convert`; paths are absolute.
    """

    kind: str
    out: Path
    inputs: Sequence[Path]
    options: Any
    settings: Settings

    def __call__(self) -> None:
        """Work and leave the process with a code; submitit never sees a return."""
        stop = Stop()
        stop.install(interactive=False)
        code = int(Outcome.ERROR)
        try:
            code = serve(self, stop)
        except UserError as error:
            code = 2
            print(f"error: {error}", file=sys.stderr)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            leave(code)

    def plan(self) -> Plan:
        """The conversion, planned. UserError as `tools.convert.convert.prepare`."""
        return prepare(self.kind, self.out, self.inputs, self.options, self.settings)


class _Stopped(BaseException):
    """The task was asked to stop: what is begun is discarded."""


def serve(job: ConvertJob, stop: Stop) -> int:
    """Write shards until none is left to claim, then finish if all are there; the task's exit code."""
    plan = job.plan()
    if plan.finished:
        print("the conversion is finished already")
        return 0
    claims = Claims(plan.out / FOLDER / _CLAIMS, slurm_job_id(os.environ))
    (plan.out / FOLDER / _FAILED / claims.owner).unlink(missing_ok=True)  # somebody requeued it all the same

    def heed(samples: int = 0) -> None:
        if stop.wishes() & Wish.STOP:
            raise _Stopped

    try:
        with told_to_people(plan):
            _work(plan, claims, heed)
    except _Stopped:
        if stop.signal == _TIME_IS_UP and claims.taken < 2:
            print("no shard was finished within the time limit: smaller shards, or a longer cluster.time")
            return int(Outcome.ERROR)  # requeued a few times only
        print(f"asked to stop by {stop.signal}: the shard begun is left to the next attempt")
        return int(Outcome.STOPPED)
    return 0


def _work(plan: Plan, claims: Claims, heed: Callable[[int], None]) -> None:
    """Work, and finish where this task was the last; a shard that repeats a key is written again."""
    before = None
    while True:
        # keys found to be repeated, all when every shard was there: more of them begin another rewrite
        rewrite = sum(map(len, making.read_left_out(plan).values()))
        if (claims.taken, rewrite) == before:
            print("the other shards are being written by other tasks: nothing left to do")
            return
        before = claims.taken, rewrite

        def claim(shard: Shard, rewrite: int = rewrite) -> bool:
            heed(0)
            # with the conversion finished, what was kept of its shards is gone: none looks written any more
            return claims.take(shard, rewrite) and not making.is_finished(plan.out)

        making.work(plan, claim, heed)
        if making.finish(plan):
            sweep(plan)  # what tasks that were killed left aside
            print(f"{plan.out}: made")
            return


@dataclass
class Claims:
    """Which task writes which shard: a file for each, made whole and once, holding the task's name.

    `rewrite` tells a shard's first writing from later ones: who wrote it first may have left since. `taken`
    counts those of this attempt.
    """

    folder: Path
    owner: str
    taken: int = 0

    def take(self, shard: Shard, rewrite: int) -> bool:
        """Claim a shard; also True for one this task claimed before it was requeued."""
        file = self.folder / f"{rewrite}-{shard.split}-{shard.number}"
        taken = files.link_once(file, self.owner) or bool(files.read_json(file) == self.owner)
        self.taken += taken
        return taken

    def any(self) -> bool:
        """Whether the task ever claimed a shard."""
        made = self.folder.glob("[!.]*")  # not what is still being written
        return any(files.read_json(file) == self.owner for file in made)


def submit(job: ConvertJob, cluster: Cluster, jobs: int) -> list[str]:
    """Plan the conversion, then queue an array of at most `jobs` tasks; none where it is finished.

    Returns the job ids. UserError as `prepare`; a % in the path of `out`; a job of this conversion still in
    the queue; SLURM's refusal.
    """
    launch.refuse_patterns(job.out)
    refuse_running(job.out)
    cluster = cluster.model_copy(update=_ONE_PROCESS)
    plan = job.plan()
    if plan.finished:
        return []
    with begun(plan):
        refuse_running(job.out)  # once more: planning may take minutes, and here nobody else submits
        folder = job.out / FOLDER
        for earlier in (_CLAIMS, _FAILED):
            shutil.rmtree(folder / earlier, ignore_errors=True)  # no job holds a claim: see above
        (folder / _CLAIMS).mkdir(parents=True)
        code = snapshot.take(folder)
        members = min(jobs, len(plan.shards))
        files.write_json(folder / JOB, {"jobs": []})
        chosen = _parameters(cluster, job.out, code)
        ids = launch.queue([job] * members, cluster, chosen, folder / LOG_FOLDER)
        files.write_json(folder / JOB, {"jobs": ids})
    return ids


def refuse_running(out: Path) -> None:
    """UserError if SLURM still shows a job of the conversion into `out`, or cannot be asked about one."""
    known = files.read_object(out / FOLDER / JOB, jobs=list)
    if known is None:
        return
    try:
        everybody = Slurm().queue()
    except (SlurmUnavailable, SlurmRefused) as error:
        raise UserError(
            f"{out} was being converted by jobs of SLURM, which cannot be asked whether they have ended "
            f"({str(error).splitlines()[-1]}); try where it can, or remove {out / FOLDER}"
        ) from None
    # by the comment those whose submitter died before it learned their ids
    mine = (job for job in everybody if job.job_id in known["jobs"] or job.comment == str(out.absolute()))
    for job in mine:
        raise UserError(
            f"{out}: job {job.job_id} of this conversion is {job.state}; wait for it, or end it "
            f"with: scancel {job.job_id.split('_')[0]}"
        )


def _parameters(cluster: Cluster, out: Path, code: Path) -> dict[str, Any]:
    """submitit's parameters: one task a member, requeued when its node is taken away."""
    return parameters.of_job(
        cluster,
        name=f"convert-{out.name}",
        comment=str(out),
        setup=script.setup(
            cluster, shlex.quote(str(code)), "-m jobs.convert", logs=out / FOLDER / LOG_FOLDER
        ),
        lead=min(_LEAD_SECONDS, int(cluster.time.minutes * 20)),
    )


def failed_jobs(out: Path) -> list[str]:
    """The jobs of the conversion into `out` that failed for good: what they had claimed nobody else writes.

    Those whose batch script could not say so (its node died, the time limit killed it) are not among them.
    """
    known = files.read_object(out / FOLDER / JOB, jobs=list) or {"jobs": []}
    return [job for job in known["jobs"] if (out / FOLDER / _FAILED / job).exists()]


def ending(code: int, slurm: Slurm) -> int:
    """What follows a task's end, by the table of a run's endings; returns `code`, of srun.

    A task is requeued where it was asked to stop or taken away, and a few times where it crashed. That it
    failed for good is recorded, if it had claimed anything.
    """
    job_id = slurm_job_id(os.environ)
    if code and (code == 2 or not _comes_back(code, job_id, slurm)):
        folder = Path(os.environ[LOGS]).parent
        try:
            if Claims(folder / _CLAIMS, job_id).any():
                (folder / _FAILED).mkdir(exist_ok=True)
                files.write_json(folder / _FAILED / job_id, {"code": code})
        except OSError as error:
            say(f"that job {job_id} failed could not be recorded: {error}")
    return code


def _comes_back(code: int, job_id: str, slurm: Slurm) -> bool:
    """Whether the task runs again, requeued here or by somebody else."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    job = facts.as_seen(facts.ask(slurm, job_id))
    out_of_time = job is not None and job.time_limit
    seen = Facts(
        code,
        said={"outcome": "stopped", "reason": ""} if code == Outcome.STOPPED else None,
        job=job,
        restart_count=restarts,
        started=True,
        fruitless=0 if out_of_time else max(0, _crashes(job_id, restarts) - 1),
    )
    verdict = decide(seen)
    say(f"verdict on job {job_id}, whose task exited with code {code}: {verdict.ending} -> {verdict.action}")
    return verdict.action == "note" or (verdict.action == "requeue" and requeue(slurm, job_id, seen) is None)


def _crashes(job_id: str, restarts: int) -> int:
    """How often the task crashed before, by what `ending` logged; where there is no log, all its restarts."""
    try:
        return (Path(os.environ[LOGS]) / f"{job_id}_0_log.err").read_bytes().count(b": crashed -> requeue\n")
    except OSError:
        return restarts


if __name__ == "__main__":
    print(ending(int(sys.argv[1]), Slurm()))
