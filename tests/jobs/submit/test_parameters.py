"""A cluster section as submitit's parameters, and the batch script it makes."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs.folder import Run
from jobs.submit.parameters import grace_seconds, lead_seconds, of_run


@pytest.fixture
def script(tmp_path):
    """The text of the batch script that submitit makes of a section."""
    from submitit.slurm.slurm import _make_sbatch_string

    def script(cluster):
        run = Run(tmp_path / "run 0")
        chosen = of_run(cluster, run, run.path / "code-1", grace=30)
        return _make_sbatch_string(command="python -m nothing", folder=run.submitit, **chosen)

    return script


def test_the_section_becomes_flags(script):
    text = script(
        Cluster(
            nodes="2-4",
            gpus_per_node=4,
            cpus_per_task=10,
            mem="200 GB",
            time="24 h",
            partition="low",
            account="lab",
            qos="normal",
            constraint="a100|h100",
        )
    )
    flags = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {
        "nodes=2-4",
        "gpus-per-node=4",
        "ntasks-per-node=4",
        "cpus-per-task=10",
        "mem=204800M",
        "time=1440",
        "partition=low",
        "account=lab",
        "qos=normal",
        "constraint='a100|h100'",
        "requeue",
        "open-mode=append",
        "signal=USR1@60",
    } <= flags
    srun = next(line for line in text.splitlines() if line.startswith("srun"))
    for flag in ("--kill-on-bad-exit=1", "--open-mode=append", "--cpus-per-task=10"):
        assert flag in srun


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"gpu_type": "a100", "gpus_per_node": 8}, ["gpus-per-node=a100:8"]),
        ({"gpus_by": "gres", "gpus_per_node": 8}, ["gres=gpu:8"]),
        ({"gpus_by": "gres", "gpu_type": "a100", "gpus_per_node": 2}, ["gres=gpu:a100:2"]),
        ({"exclusive": True, "reservation": "maintenance"}, ["exclusive", "reservation=maintenance"]),
    ],
)
def test_what_a_site_asks_for(script, given, flags):
    lines = script(Cluster(**given)).splitlines()
    assert {f"#SBATCH --{flag}" for flag in flags} <= {*lines}
    assert sum("gpu" in line for line in lines if line.startswith("#SBATCH")) == 1


def test_what_is_not_given_is_not_asked_for(script):
    text = script(Cluster(gpus_per_node=0))
    for flag in (
        "--gpus",
        "--mem",
        "--partition",
        "--account",
        "--qos",
        "--constraint",
        "--gres",
        "--excl",
        "--reserv",
    ):
        assert flag not in text


def test_the_script_is_shielded_before_anything_else(script):
    lines = script(Cluster(setup=("module load cuda",), environment={"NCCL_DEBUG": "a 'b'"})).splitlines()
    setup = lines[lines.index("# setup") + 1 :]
    assert setup[0] == "trap 'clipcluster_end $?' EXIT"
    assert setup[1].startswith("trap : TERM")
    assert setup.index("module load cuda") > 0
    teardown = lines[lines.index("# teardown") + 1 :]
    assert teardown == ["clipcluster_end $?"]


def test_bash_understands_the_script(script, tmp_path):
    text = script(Cluster(environment={"WORDS": "a 'b' \"c\" $d"}))
    file = tmp_path / "job.sh"
    file.write_text(text)
    done = subprocess.run(["bash", "-n", file], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    # up to the claim it can be run here
    ending = next(n for n, line in enumerate(text.splitlines()) if line.startswith("cd "))
    file.write_text(
        "\n".join([*text.splitlines()[:ending], 'echo "$clipcluster_marks|$WORDS"', "trap - EXIT"])
    )
    done = subprocess.run(["bash", file], capture_output=True, text=True, env={})
    assert done.stdout.strip() == f"{tmp_path}/run 0/marks|a 'b' \"c\" $d"


def test_the_lead_time_covers_two_saves():
    assert lead_seconds(24 * 3600, 120) == 240
    assert lead_seconds(24 * 3600, 10) == 60
    assert lead_seconds(60, 120) == 20
    assert lead_seconds(1, 30) == 1


def test_the_lead_time_follows_what_was_measured(script, tmp_path):
    assert lead_seconds(24 * 3600, 120, measured=7.5) == 60
    assert lead_seconds(24 * 3600, 10, measured=300.2) == 311
    assert lead_seconds(600, 10, measured=300.2) == 200
    run = Run.create(tmp_path / "run 0", {}, {})
    attempt = run.claim("1", host="here", still_running=lambda job: False)
    attempt.event("checkpoint", writer="rank-0", seconds=50.0)
    assert "#SBATCH --signal=USR1@110" in script(Cluster(time="4 h"))


@pytest.mark.parametrize(("told", "expected"), [(None, 4), (3, 3), (5, 4)])
def test_the_ranks_are_told_how_much_time_they_have(script, told, expected):
    """Hours until the limit: as this node's clock has it, or SLURM's, whatever comes first."""
    lines = script(Cluster(time="4 h")).splitlines()
    kinds = ("export CLIPCLUSTER_", "clipcluster_ends=", "clipcluster_told=")
    exports = [line for line in lines if line.startswith(kinds) and "LOGS" not in line]
    known = {"SLURM_JOB_END_TIME": str(int(time.time() + told * 3600))} if told else {}
    shell = "\n".join(["set -eu", *exports, "echo $CLIPCLUSTER_LEAD $CLIPCLUSTER_GRACE $CLIPCLUSTER_ENDS"])
    environment = {"PATH": os.environ["PATH"], **known}
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment)
    lead, grace, ends = map(int, done.stdout.split())
    assert (lead, grace) == (60, 30)
    assert ends == pytest.approx(time.time() + expected * 3600, abs=5)


def test_the_grace_time_without_slurm():
    assert grace_seconds(Cluster(grace="2 min"), None) == 120
    assert grace_seconds(Cluster(), None) == 30


class Site:
    """A cluster of which SLURM tells this much."""

    def __init__(self, partitions, wait):
        self._partitions, self._wait = partitions, wait

    def partitions(self):
        return self._partitions

    def kill_wait(self):
        return self._wait


@pytest.mark.parametrize(
    ("partition", "wait", "expected"),
    [("low", 30, 10), ("low", 5, 5), ("high", 30, 30), (None, 30, 20), ("high,main,low", 30, 10)],
)
def test_the_grace_time_that_slurm_tells(partition, wait, expected):
    from tools.slurm import parse_partitions

    text = "\n\n".join(
        f"PartitionName={name} Default={default} Nodes=n1 GraceTime={grace}"
        for name, default, grace in (("low", "NO", 10), ("high", "NO", 0), ("main", "YES", 20))
    )
    assert grace_seconds(Cluster(partition=partition), Site(parse_partitions(text), wait)) == expected


def test_paths_are_quoted(script):
    assert "run 0'" in script(Cluster())
    assert str(Path("/")) in script(Cluster())
