"""The check beside a real cluster: what SLURM does not have, and when a job would start."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from clipcluster.check import plain
from clipcluster.errors import UserError
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs.folder import Run
from jobs.check.known import ask
from jobs.submit import checking, launch, parameters, placement
from tools.convert.convert import convert
from tools.slurm import SlurmRefused

# A cluster of its own: scontrol of SLURM 22.05 refuses to empty a node's features.
HOUR = (("PartitionName=high Nodes=ALL MaxTime=INFINITE", "PartitionName=high Nodes=ALL MaxTime=60"),)
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.long,
    pytest.mark.parametrize("sandbox", [HOUR], indirect=True, ids=["hour"]),
]
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits.yaml"
SMALL = ("cluster.tasks_per_node=2", "data.batch_size=128")
# Overrides -> what the check says. Partition high takes an hour here, node n1 has the feature fast.
PLANTED = {
    ("cluster.partition=lwo",): "there is no partition 'lwo'; did you mean low?",
    ("cluster.partition=high", "cluster.time=2 h"): "2 h requested, and partition high allows (MaxTime) 1 h",
    ("cluster.nodes=8",): "8 requested, and partition low has 4 nodes; set it to at most 4",
    ("cluster.constraint=fsat",): "no node of partition low has 'fsat'; did you mean fast?",
    ("cluster.constraint=fast|fsat",): "no node of partition low has 'fsat'; did you mean fast?",
    ("cluster.gpus_per_node=1",): "1 requested, and nodes of partition low have none",
    ("cluster.mem=9000 MB",): "9000 MB requested, and nodes of partition low have 8000 MB",
    ("cluster.cpus_per_task=3",): "2 ranks x 3 CPUs are 6 on a node, and nodes of partition low have 4",
}


def scontrol(*words: str) -> None:
    subprocess.run(["scontrol", *words], check=True, capture_output=True)


@pytest.fixture
def site(cluster, tmp_path, monkeypatch):
    """The sandbox with a feature, asked by a check of the demo's recipe."""
    convert("digits", tmp_path / "digits")
    monkeypatch.setenv("DIGITS", str(tmp_path / "digits"))
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    scontrol("update", "NodeName=n1", "AvailableFeatures=fast")
    return cluster


def checked(folder: Path, *overrides: str) -> plain.Checked:
    found = plain.check(RECIPE, [*SMALL, *overrides], runs=folder)
    checking.complete(found, checking.run_of(found, folder), "slurm", quick=True)
    return found


@pytest.mark.parametrize(("overrides", "said"), PLANTED.items(), ids=lambda value: str(value)[:40])
def test_what_the_cluster_has_not(site, tmp_path, overrides, said):
    found = checked(tmp_path / "runs", *overrides)
    (error,) = found.errors
    assert said in error
    flags = parameters.of_run(found.recipe.cluster, Run(tmp_path / "run"), tmp_path, grace=5)
    arguments = placement.sbatch_arguments(flags)
    if "MaxTime" in said:  # SLURM accepts it, names a time of its start, and would never start it
        assert site.slurm.expected_start(*arguments)
        return
    with pytest.raises(SlurmRefused):  # SLURM's own answer is the same, though it tells less
        site.slurm.expected_start(*arguments)


def test_the_towers_are_not_built_for_a_cluster_that_refuses_the_job(site, tmp_path):
    said = []
    found = plain.check(RECIPE, [*SMALL, "cluster.partition=lwo"], runs=tmp_path / "runs")
    checking.complete(
        found, Run(tmp_path / "runs" / "x"), "slurm", quick=False, refused_ends=True, say=said.append
    )
    assert (len(found.errors), said, "memory_bytes" in found.figures) == (1, [], False)
    assert found.unchecked[-1].endswith("checkpoint size: skipped; fix the errors first")
    found = plain.check(RECIPE, SMALL, runs=tmp_path / "runs")
    checking.complete(
        found, Run(tmp_path / "runs" / "x"), "slurm", quick=False, refused_ends=True, say=said.append
    )
    assert (found.errors, len(said), "memory_bytes" in found.figures) == ([], 1, True)


def test_a_right_recipe_and_when_it_would_start(site, tmp_path):
    found = checked(tmp_path / "runs", "cluster.constraint=fast")
    assert (found.errors, found.warnings, len(found.unchecked)) == ([], [], 1)
    facts = {line.partition(": ")[0]: line.partition(": ")[2] for line in found.summary}
    assert facts["partition"] == "low (the default), 4 nodes of 4 CPUs, 8000 MB; no time limit"
    assert facts["preemption"] == "PreemptMode=REQUEUE, GraceTime 10 s, KillWait 5 sec, JobRequeue=1"
    assert "on n1, by the queue as it is" in facts["start"]
    assert found.figures["expected_start"]
    assert site.slurm.queue() == []  # nothing was submitted


def test_a_job_that_must_wait_is_no_error(site, tmp_path):
    """sbatch takes such jobs, although its test refuses them."""
    scontrol("update", "NodeName=n4", "State=DRAIN", "Reason=fan")
    try:
        found = checked(tmp_path / "runs", "cluster.nodes=4", "data.batch_size=128")
    finally:
        scontrol("update", "NodeName=n4", "State=RESUME")
    assert found.errors == []
    (warning,) = found.warnings
    assert "3 of the 4 nodes of partition low are up, the others drained: the job waits for them" in warning
    assert found.unchecked[-1].startswith("expected start (")
    scontrol("update", "PartitionName=high", "State=DOWN")
    try:
        found = checked(tmp_path / "runs", "cluster.partition=high", "cluster.time=30 min")
    finally:
        scontrol("update", "PartitionName=high", "State=UP")
    assert found.errors == []
    assert "partition high is DOWN: jobs wait until it is up again" in found.warnings[0]


def test_without_accounting_it_is_said_where_it_matters(site, tmp_path):
    found = checked(tmp_path / "runs", "cluster.account=vision")
    assert found.errors == []
    assert found.unchecked[-1].startswith("cluster.account (")
    assert set(ask(site.slurm).silent) == {"associations", "qos"}


def test_inherited_variables_are_left_out(site, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    monkeypatch.setenv("SBATCH_PARTITION", "high")
    found = checked(tmp_path / "runs", "cluster.time=2 h")
    assert "partition high allows (MaxTime) 1 h" in found.errors[0]  # sbatch prefers the variable
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    found = checked(tmp_path / "runs", "cluster.time=2 h")
    assert found.errors == []
    assert any(
        line.startswith("environment: left out of the job: ") and "SLURM_MEM_PER_NODE" in line
        for line in found.summary
    )


def test_a_refusal_of_sbatch_is_told_in_its_own_words(site, tmp_path, code):
    run = Run.create(tmp_path / "run", {"name": "run"}, {"none": 0})
    with pytest.raises(UserError, match="SLURM refused the job"):
        launch.on_slurm(Cluster(partition="nowhere", gpus_per_node=0), run, code, grace=5)
