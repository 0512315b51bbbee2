"""Site profiles on a real cluster: one is written and checked; ranks in a container are preempted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipcluster.recipe.load import load_cluster
from clipcluster.runs.folder import Run
from jobs.submit import snapshot
from tools.convert.convert import convert
from tools.sandbox.preempt import preempt

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]
# Stands in for apptainer: of the test's folder the ranks see what is mounted, and nothing else; no program of
# SLURM; variables as in an image. It writes down its arguments, then the variables that the ranks are given.
APPTAINER = """#!/bin/bash
[ -n "$STAND_IN" ] || STAND_IN=1 exec unshare --map-root-user --mount "$0" "$@"
line="$*"
[ "$1" = exec ] || exit 64
shift
mount -t tmpfs none /mnt || exit 70
sources=()
while [[ $1 == --* ]]; do
    case $1 in
    --pwd) work=$2; shift 2 ;;
    --bind)
        mkdir "/mnt/${{#sources[@]}}" && mount --bind "${{2%%:*}}" "/mnt/${{#sources[@]}}" || exit 66
        sources+=("${{2%%:*}}"); shift 2 ;;
    *) exit 67 ;;
    esac
done
[ -e "$1" ] || exit 68
shift
export PYTHONPATH=/image TRAINEE=image
for name in "${{!APPTAINERENV_@}}"; do export "${{name#APPTAINERENV_}}=${{!name}}"; done
unset SLURM_CONF
(echo "$line"; env | grep -E '^(CLIPCLUSTER_|HF_HUB|TRAINEE=|PYTHONPATH=)' | sort) >> {folder}/apptainer.log
mount -t tmpfs none {folder} || exit 71
for number in "${{!sources[@]}}"; do
    mkdir -p "${{sources[number]}}" && mount --bind "/mnt/$number" "${{sources[number]}}" || exit 72
done
cd "$work" || exit 65
PATH=/image/bin exec "$@"
"""


@pytest.fixture
def apptainer(tmp_path, monkeypatch):
    """The stand-in on the PATH, and a container section that uses it; `log` has its arguments."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "apptainer"
    log = tmp_path / "apptainer.log"
    program.write_text(APPTAINER.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "torch.sif").touch()
    section = {"runtime": "apptainer", "image": str(tmp_path / "torch.sif"), "python": sys.executable}
    return section, log


@pytest.fixture
def site(cluster, tmp_path, monkeypatch):
    """Runs the command; the profiles are in a folder of the test's own."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("CLIPCLUSTER_RUNS", str(tmp_path / "runs"))

    def site(*words):
        return subprocess.run(
            [sys.executable, "-m", "jobs.cli", "site", *words], capture_output=True, text=True, cwd=ROOT
        )

    return site


def checked(site, *words, code=0):
    """The findings of a check by subject, each the worst of its subject."""
    done = site("check", "here", *words, "--json")
    assert done.returncode == code, done.stdout + done.stderr
    lines = json.loads(done.stdout)["findings"]
    return {
        line["what"]: line for kind in ("ok", "warning", "error") for line in lines if line["kind"] == kind
    }


def left(cluster, tmp_path):
    """What a check leaves behind: jobs, and files in the folder of runs."""
    jobs = [job for job in cluster.slurm.queue() if job.state != "COMPLETING"]
    return jobs, list((tmp_path / "runs").iterdir())


def test_a_profile_is_written_checked_and_used(site, cluster, tmp_path):
    done = site("new", "here")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "config" / "clipcluster" / "sites" / "here.yaml"
    assert file.read_text() in done.stdout
    again = site("new", "here")
    assert again.returncode == 2
    assert "exists; remove it first" in again.stderr
    written = load_cluster()  # the only one there is
    assert (written.partition, written.gpus_per_node, written.cpus_per_task) == ("low", 0, 4)
    assert "# No answer: associations (" in file.read_text()  # the sandbox has no accounting
    assert "low (default): 4 x 4 CPUs, 8000 MB; no time limit; preempted: REQUEUE, 10 s" in file.read_text()

    lines = checked(site)
    assert {line["kind"] for line in lines.values()} <= {"ok", "warning"}
    assert "2 ranks on 2 nodes" in lines["job"]["found"]
    assert lines["requeue"] == {**lines["requeue"], "kind": "ok", "found": "the job may requeue itself"}
    assert "gloo, 2 ranks on 2 nodes: 16 MiB in" in lines["all-reduce"]["found"]
    assert "the ranks meet at 127.0.0.1" in lines["network"]["found"]
    assert {"node n1", "node n2", "software", "shared folder", "clocks", "scontrol"} <= {*lines}
    assert left(cluster, tmp_path) == ([], [])


SCONTROL = """#!/bin/bash
[ "$1" != requeue ] || {{ echo "scontrol: error: Requested operation is presently disabled" >&2; exit 1; }}
exec {scontrol} "$@"
"""


def test_what_is_wrong_is_said(site, cluster, tmp_path, apptainer):
    """A cluster on which jobs may not be requeued, and the ranks of a container find no interface ib7."""
    section, log = apptainer
    forbids = tmp_path / "bin" / "scontrol"
    forbids.write_text(SCONTROL.format(scontrol=shutil.which("scontrol")))
    forbids.chmod(0o755)
    assert site("new", "here", "--partition", "high").returncode == 0
    words = [f"container.{key}={value}" for key, value in section.items()]
    lines = checked(site, *words, "interface=ib7", code=1)
    assert (lines["requeue"]["kind"], lines["scontrol"]["kind"]) == ("error", "ok")
    assert "Requested operation is presently disabled" in lines["requeue"]["found"]
    assert "ask the administrators" in lines["requeue"]["advice"]
    assert (lines["job"]["kind"], lines["network"]["kind"], "all-reduce" in lines) == ("ok", "error", False)
    assert "no network interface 'ib7'" in lines["network"]["found"]
    assert log.read_text().count("exec --pwd") >= 1
    assert left(cluster, tmp_path) == ([], [])


def test_a_node_without_scontrol(site, cluster, tmp_path):
    """srun is there, and the job runs; nobody could tell a preemption, or requeue."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for program in Path(folder).iterdir():
            if program.name != "scontrol" and not (programs / program.name).exists():
                (programs / program.name).symlink_to(program)
    assert site("new", "here").returncode == 0
    lines = checked(site, "nodes=1", f"setup=['export PATH={programs}']", code=1)
    assert lines["scontrol"]["found"] == "on n1: no scontrol on the PATH"
    assert lines["requeue"]["kind"] == "error"
    assert "no scontrol on the PATH" in lines["requeue"]["found"]
    assert "1 rank on 1 node" in lines["job"]["found"]
    assert lines["all-reduce"]["kind"] == "warning"
    assert left(cluster, tmp_path) == ([], [])


def test_a_job_that_fails_before_its_ranks_says_why(site, cluster, tmp_path):
    assert site("new", "here").returncode == 0
    lines = checked(site, "setup=['echo no such module >&2; exit 3']", code=1)
    assert lines["job"]["kind"] == "error"
    assert "no such module" in lines["job"]["found"]
    assert left(cluster, tmp_path) == ([], [])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("partition=hihg", "there is no partition 'hihg'; did you mean high?"),
        ("nodes=5", "5 requested, and partition low has 4 nodes"),
        ("gpus_per_node=1", "nodes of partition low have none; SLURM knows of no such GPUs"),
        ("reservation=none", "there is no reservation 'none'"),
    ],
)
def test_what_slurm_does_not_have_is_not_queued(site, tmp_path, word, said):
    assert site("new", "here").returncode == 0
    refused = site("check", "here", word)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert said in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_a_check_that_waits_is_given_up_when_the_job_cannot_start_and_on_signals(site, cluster, tmp_path):
    """Three checks behind a job that has all nodes: one of them is held, two get a signal."""
    assert site("new", "here").returncode == 0
    blocker = cluster.slurm.submit("--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    words = [sys.executable, "-m", "jobs.cli", "site", "check", "here", "--json"]
    checks = [
        subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    deadline = time.monotonic() + 120
    waiting = []
    while len(waiting) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
        waiting = [job for job in cluster.slurm.queue() if job.job_id != blocker]
    held, interrupted, terminated = checks
    mine = {job.comment: job.job_id for job in waiting}
    time.sleep(3)  # the checks have learned the ids of their jobs
    interrupted.send_signal(signal.SIGINT)
    terminated.send_signal(signal.SIGTERM)
    for process in (interrupted, terminated):
        out, said = process.communicate(timeout=60)
        assert (process.returncode, out) == (130, ""), said
        assert "waits (Resources)" in said or "waits (Priority)" in said
    (job,) = [job for job in cluster.slurm.queue() if job.job_id != blocker]
    assert job.job_id in mine.values()
    subprocess.run(["scontrol", "hold", job.job_id], check=True)
    out, said = held.communicate(timeout=60)
    assert held.returncode == 1, said
    (finding,) = json.loads(out)["findings"]
    assert finding["found"].startswith(f"job {job.job_id} does not start: JobHeld")
    assert [job.job_id for job in cluster.slurm.queue()] == [blocker]
    assert list((tmp_path / "runs").iterdir()) == []


SBATCH = """#!/bin/bash
{sbatch} "$@" >&2
echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2
exit 1
"""


def test_a_job_that_sbatch_did_not_tell_of_is_cancelled(site, cluster, tmp_path, apptainer):
    assert site("new", "here").returncode == 0
    silent = tmp_path / "bin" / "sbatch"
    silent.write_text(SBATCH.format(sbatch=shutil.which("sbatch")))
    silent.chmod(0o755)
    done = site("check", "here")
    assert (done.returncode, done.stdout) == (2, "")
    assert "sbatch gave no answer" in done.stderr
    assert "Submitted batch job" in done.stderr or "Socket timed out" in done.stderr
    assert left(cluster, tmp_path) == ([], [])


def test_ranks_in_a_container_are_preempted_and_resume_without_a_client_of_slurm(bench, apptainer):
    section, log = apptainer
    orders = {"steps": 60, "seconds": 0.1}
    run = Run.create(bench.folder / "run", {"name": "run"}, {"none": 0})
    code = snapshot.take(run.path)  # as a submission does
    variables = {"SAID": "it's 'two  words'", "HF_HUB_OFFLINE": "0"}
    job = bench.submit_again(run, orders, code=code, nodes=2, container=section, environment=variables)
    bench.at_step(run, 5)
    preempt(bench.sandbox.folder, job)
    bench.finished(run, job, 2, 60, 2)
    assert bench.verdict(run, 1)["ending"] == "preempted"
    text = log.read_text()
    starts = [line for line in text.splitlines() if line.startswith("exec ")]
    assert len(starts) == 8  # two attempts, each of four ranks
    assert all(f"--bind {run.path} --bind {run.submitit} {section['image']}" in line for line in starts)
    for line in (f"PYTHONPATH={code}:", f"CLIPCLUSTER_LOGS={run.submitit}", "HF_HUB_OFFLINE=0"):
        assert text.count(line) == 8
    assert (text.count("CLIPCLUSTER_ATTEMPT=1\n"), text.count("CLIPCLUSTER_ATTEMPT=2\n")) == (4, 4)


def test_a_training_and_its_export_in_a_container(site, cluster, tmp_path, apptainer):
    """A profile is written and used: the data is seen through a mount, the export lies outside."""
    section, log = apptainer
    convert("digits", tmp_path / "digits")
    assert site("new", "here").returncode == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"extends: {ROOT}/recipes/digits.yaml\n"
        f"then: [{{export: safetensors, out: {tmp_path}/exported/here}}]\n"
        f"cluster: {{container: {json.dumps({**section, 'mounts': [str(tmp_path / 'digits')]})}}}\n"
    )
    words = ["submit", str(recipe), "--site", "here", "--quick", "train.duration=30 steps", "name=inside"]
    environ = {**os.environ, "DIGITS": str(tmp_path / "digits")}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *words], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 200
    while cluster.slurm.queue() and time.monotonic() < deadline:
        time.sleep(0.5)
    (run,) = (tmp_path / "runs").glob("inside-*")
    logs = "\n".join(file.read_text() for file in run.rglob("*_log.err"))
    assert Run(run).newest().outcome()["outcome"] == "finished", logs
    assert (tmp_path / "exported" / "here" / "export.json").exists(), logs
    assert log.read_text().count("exec --pwd") == 3  # two ranks and an export
