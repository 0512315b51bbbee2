"""The batch script, run by bash as it is: SLURM's two programs are stand-ins, claim and verdict are real."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from clipcluster.recipe.sections.cluster import Cluster
from jobs.endings import act, history
from jobs.submit.parameters import of_run
from tools.slurm import Slurm

ROOT = Path(__file__).resolve().parents[3]
RUNNING = """\
JobId=17 JobName=Restarts=9
   JobState=RUNNING Reason=None
   Requeue=1 Restarts=0
   PreemptTime=None
   Command=(null)
   Comment=JobState=FAILED PreemptTime=2026
"""
SCONTROL = """#!/bin/sh
echo "$@" >> {folder}/calls
case "$1" in
show) cat {folder}/job ;;
requeue) [ ! -e {folder}/refused ] || {{ echo "disabled" >&2; exit 1; }} ;;
esac
"""


class Job:
    """One job's batch script: made by submitit of a cluster section, run by bash, logging as SLURM would."""

    def __init__(self, run, folder):
        self.run, self.folder, self.name, self.code = run, folder, "17", ROOT
        self.evaluations = False
        self.programs = folder / "programs"
        self.programs.mkdir()
        self.program("scontrol", SCONTROL.format(folder=folder))
        self.program("sleep", "#!/bin/sh\n")
        self.seen()
        run.submitit.mkdir()
        (run.submitit / "job.pkl").touch()

    def program(self, name, text):
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def seen(self, **changed):
        """What `scontrol show job` prints."""
        text = RUNNING
        for key, value in changed.items():
            text = re.sub(rf"(?m)^(   (?:\S+ )?{key})=\S+", rf"\1={value}", text, count=1)
        (self.folder / "job").write_text(text)

    def script(self, srun, **cluster):
        from submitit.slurm.slurm import _make_sbatch_string

        self.program("srun", f"#!/bin/sh\n{srun}\n")
        chosen = of_run(
            Cluster(gpus_per_node=0, **cluster), self.run, self.code, grace=30, evaluations=self.evaluations
        )
        return _make_sbatch_string(command="ranks", folder=self.run.submitit, **chosen)

    def start(self, srun="exit 0", *, restarts=0, environment=None, **cluster):
        """Run the script to its end; its exit code."""
        given = {**os.environ, "PATH": f"{self.programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
        given |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        with (self.run.submitit / f"{self.name}_0_log.err").open("ab") as log:
            done = subprocess.run(
                ["bash", "-c", self.script(srun, **cluster)], stderr=log, env={**given, **(environment or {})}
            )
        return done.returncode

    @property
    def log(self):
        return (self.run.submitit / f"{self.name}_0_log.err").read_text()

    def asked(self, verb):
        """What scontrol was asked with this verb."""
        calls = self.folder / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [line for line in lines if line.startswith(verb)]


@pytest.fixture
def job(run, tmp_path):
    return Job(run, tmp_path)


def no_interpreter(job, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/bin/python")


def no_code(job, monkeypatch):
    job.code = Path("/nowhere/code")


def no_claim(job, monkeypatch):
    job.run.attempts_dir.rmdir()
    job.run.attempts_dir.write_text("a file, as a file system that fails might have it")


BROKEN = [no_interpreter, no_code, no_claim]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_bad_node_is_left_once_and_then_ends_the_run(job, monkeypatch, broken):
    broken(job, monkeypatch)
    assert job.start() == 85
    assert job.asked("requeue") == ["requeue 17"]
    assert "clipcluster: no verdict" in job.log
    job.seen(Restarts=1)
    assert job.start(restarts=1) == 1
    assert job.asked("requeue") == ["requeue 17"]


@pytest.mark.parametrize("line", ["exit 3", "set -eu; false", "set -u; echo $not_set_anywhere"])
def test_a_failing_line_of_the_site_is_a_bad_node(job, line):
    assert job.start(setup=[line]) == 85
    assert job.asked("requeue") == ["requeue 17"]


def test_a_verdict_between_begins_anew(job, monkeypatch):
    with monkeypatch.context() as patch:
        no_interpreter(job, patch)
        assert job.start() == 85
    job.seen(Restarts=1)
    assert job.start("exit 1", restarts=1) == 85  # never started: requeued by the verdict
    assert history.last_verdict(job.run.newest())["event"] == "requeue"
    job.seen(Restarts=2)
    no_interpreter(job, monkeypatch)
    assert job.start(restarts=2) == 85, job.log
    assert len(job.asked("requeue")) == 3


def test_a_preemption_counts_nothing(job, monkeypatch):
    no_interpreter(job, monkeypatch)
    job.seen(PreemptTime="2026-11-21T02:23:32")
    assert [job.start() for _ in range(3)] == [85, 85, 85]
    assert len(job.asked("requeue")) == 3
    job.seen()
    assert job.start() == 85


def test_scancel_before_the_ranks_ends_the_run(job, monkeypatch):
    no_interpreter(job, monkeypatch)
    job.seen(JobState="COMPLETING")
    assert job.start() == 130
    job.seen(JobState="CANCELLED+COMPLETING")
    assert job.start() == 130
    assert job.asked("requeue") == []
    assert job.run.cancelled_jobs() == {"17"}


def test_a_job_that_slurm_is_signaling_runs(job, monkeypatch):
    no_interpreter(job, monkeypatch)
    job.seen(JobState="SIGNALING", PreemptTime="2026-11-21T02:23:32")
    assert job.start() == 85
    job.seen(JobState="WORD_OF_A_LATER_VERSION", PreemptTime="2026-11-21T02:23:32")
    assert job.start() == 85
    assert job.asked("requeue") == ["requeue 17"] * 2
    assert job.run.cancelled_jobs() == set()


def test_out_of_time_before_the_ranks_is_a_bad_node_too(job):
    job.seen(JobState="COMPLETING", Reason="TimeLimit")
    assert job.start(setup=["exit 3"]) == 85
    assert job.asked("requeue") == ["requeue 17"]


def test_a_job_that_somebody_requeued_is_left_alone(job, monkeypatch):
    no_interpreter(job, monkeypatch)
    job.seen(JobState="COMPLETING", Restarts=1)
    assert job.start() == 85
    assert job.asked("requeue") == []


def test_a_member_of_an_array_requeues_itself_alone(job, monkeypatch):
    no_interpreter(job, monkeypatch)
    job.name = "40_1"
    member = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "1"}
    assert job.start(environment=member) == 85
    assert job.asked("requeue") == ["requeue 40_1"]
    assert job.asked("show") == ["show job 40_1"]


def test_a_refused_requeue_is_tried_and_then_left(job, monkeypatch):
    no_interpreter(job, monkeypatch)
    (job.folder / "refused").touch()
    assert job.start() == 85
    assert len(job.asked("requeue")) == 30
    assert "did not requeue job 17" in job.log


@pytest.mark.parametrize("log", ["absent", "full"])
def test_without_a_log_the_restarts_alone_count(job, monkeypatch, log):
    no_interpreter(job, monkeypatch)
    script = job.script("exit 0")
    if log == "absent":
        job.run.submitit.rename(job.folder / "elsewhere")
    given = {**os.environ, "PATH": f"{job.programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    for restarts, code in ((0, 85), (1, 1)):
        job.seen(Restarts=restarts)
        with open("/dev/full" if log == "full" else "/dev/null", "wb") as stream:
            environment = {**given, "SLURM_RESTART_COUNT": str(restarts)}
            done = subprocess.run(["bash", "-c", script], env=environment, stderr=stream)
        assert done.returncode == code
    assert job.asked("requeue") == ["requeue 17"]


def test_an_owned_run_is_left_and_a_finished_one_is_no_error(job):
    job.run.claim("16", host="n1", still_running=lambda job: False)
    (job.folder / "job").write_text(RUNNING.replace("JobId=17", "JobId=16"))
    assert job.start() == 88
    job.run.newest().write_outcome(outcome_name="finished", code=0, rank=0)
    assert job.start() == 0
    assert job.asked("requeue") == []
    assert len(job.run.attempts()) == 1


def test_the_verdict_decides_where_it_can(job):
    outcome = json.dumps(
        {"outcome": "failed", "code": 90, "reason": "shard 3", "advice": "", "rank": 0, "host": "n"}
    )
    assert job.start(f"echo '{outcome}' > {job.run.attempts_dir}/1/outcome.json; exit 90") == 90
    assert history.last_verdict(job.run.attempt(1))["event"] == "fail"
    assert job.asked("requeue") == []


@pytest.mark.parametrize(
    "line", ["", "set -euo pipefail", "run=mine; job=mine; rc=0", "trap 'echo mine' EXIT"]
)
def test_whatever_the_site_sets_the_verdict_is_reached(job, line):
    assert job.start("exit 1", setup=[line]) == 85
    assert history.last_verdict(job.run.attempt(1))["ending"] == "never started"
    assert job.asked("requeue") == ["requeue 17"]


def test_a_verdict_that_fails_is_followed_by_one_requeue(job):
    torn = f"echo torn > {job.run.attempts_dir}/$CLIPCLUSTER_ATTEMPT/outcome.json; exit 85"
    assert job.start(torn) == 85
    assert job.asked("requeue") == ["requeue 17"]
    assert "outcome.json" in job.log
    job.seen(Restarts=1)
    job.run.attempt(1).path.joinpath("outcome.json").unlink()
    assert job.start(torn, restarts=1) == 1
    assert job.asked("requeue") == ["requeue 17"]


def test_the_interpreter_may_lie_anywhere(job, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/LOGS/VERDICT/line\u2028break/python")
    decide = "'/LOGS/VERDICT/line\u2028break/python' -m jobs.endings verdict \"$clipcluster_run\""
    assert f'"$({decide} "$1")"' in job.script("exit 0")


MEANWHILE = """#!/bin/sh
case "$1" in
show) cat {folder}/job ;;
requeue)
    echo >> {folder}/asked
    cp {folder}/after {folder}/job
    {answer} ;;
esac
"""


@pytest.mark.parametrize("answer", ["exec /bin/sleep 5", "echo 'socket timed out' >&2; exit 1"])
def test_a_requeue_whose_answer_was_lost_is_no_refusal(job, monkeypatch, answer):
    """SLURM did it, and would answer a second try that the job is pending."""
    job.program("scontrol", MEANWHILE.format(folder=job.folder, answer=answer))
    (job.folder / "after").write_text(
        RUNNING.replace("RUNNING", "COMPLETING").replace("Restarts=0", "Restarts=1")
    )
    monkeypatch.setenv("PATH", f"{job.programs}:{os.environ['PATH']}")
    attempt = job.run.claim("17", host="n1", still_running=lambda job: False)
    code = act.conclude(job.run, attempt, 137, Slurm(timeout=0.5), {"SLURM_JOB_ID": "17"})
    assert (code, history.batch_events(attempt)[-1]["event"]) == (85, "requeue")
    assert (job.folder / "asked").read_text() == "\n"


@pytest.mark.parametrize("when", ["after the verdict", "while SLURM refuses"])
def test_a_scancel_before_the_requeue_ends_the_run(job, monkeypatch, when):
    (job.folder / "after").write_text(RUNNING.replace("RUNNING", "COMPLETING"))
    job.program("scontrol", MEANWHILE.format(folder=job.folder, answer="echo disabled >&2; exit 1"))
    monkeypatch.setenv("PATH", f"{job.programs}:{os.environ['PATH']}")
    attempt = job.run.claim("17", host="n1", still_running=lambda job: False)
    record = act.record

    def recorded(*given, **more):
        if when == "after the verdict":
            shutil.copy(job.folder / "after", job.folder / "job")
        return record(*given, **more)

    monkeypatch.setattr(act, "record", recorded)
    assert act.conclude(job.run, attempt, 137, Slurm(), {"SLURM_JOB_ID": "17"}) == 130
    assert history.last_verdict(attempt)["event"] == "cancel"
    assert job.run.cancelled_jobs() == {"17"}
    assert (job.folder / "asked").exists() == (when == "while SLURM refuses")


def test_a_silent_slurm_is_not_asked_again_before_the_requeue(job, monkeypatch):
    """Little time may be left: each question that it does not answer takes ten seconds."""
    text = SCONTROL.format(folder=job.folder).replace("show)", "show) echo 'socket timed out' >&2; exit 1;")
    job.program("scontrol", text)
    monkeypatch.setenv("PATH", f"{job.programs}:{os.environ['PATH']}")
    attempt = job.run.claim("17", host="n1", still_running=lambda job: False)
    assert act.conclude(job.run, attempt, 137, Slurm(), {"SLURM_JOB_ID": "17"}) == 85
    assert (job.folder / "calls").read_text() == "show job 17\nrequeue 17\n"


@pytest.mark.parametrize(
    ("outcome", "code", "looks"), [("finished", 0, 2), ("failed", 90, 2), ("stopped", 85, 1)]
)
def test_owed_evaluations_are_looked_at_beside_the_ranks_and_after_the_last(job, outcome, code, looks):
    """One is owed that cannot be started, since this run's recipe says nothing: each look says so once."""
    job.evaluations, path = True, job.run.path
    (path / "settings.yaml").write_text("executor: slurm\n")
    (job.run.evals / "owed").mkdir()
    (job.run.evals / "owed" / "step-00000005-1a2b").write_text('{"attempt": 1}')
    folder = job.run.checkpoints / "step-00000005"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    (folder / "manifest.json").write_text('{"files": {"state.json": {"bytes": 2, "sha256": ""}}}')
    end = {"outcome": outcome, "code": code, "reason": "", "advice": "", "rank": 0, "host": "n1"}
    said, log = "could not be started", job.run.submitit / "17_0_log.err"
    srun = f"until grep -q '{said}' {log}; do /bin/sleep 0.05; done"
    srun += f"\ncat >{path}/attempts/1/outcome.json <<'END'\n{json.dumps(end)}\nEND\nexit {code}"
    assert job.start(srun) == code
    assert job.log.count(said) == looks, job.log
    assert "disown" not in job.log
    if outcome == "finished":  # as ranks may do after the verdict: the job that starts again finds it so
        assert job.start() == 0
        assert job.log.count(said) == looks + 1, job.log
    deadline = time.monotonic() + 10
    while any(str(path) in words and "watch" in words for words in commands()):
        assert time.monotonic() < deadline, "it outlives the ranks"


def commands():
    """The words of every process that can be seen."""
    return [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
