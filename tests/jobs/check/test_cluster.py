"""The section `cluster` against what SLURM answers."""

import pytest

from clipcluster.recipe.sections.cluster import Cluster
from jobs.check import cluster as asked
from jobs.check import preemption
from jobs.check.known import Known
from jobs.submit.checking import of_environment, sbatch_arguments
from tests.jobs.check.clusters import known
from tools import slurm


def compare(answers: Known | None = None, **keys: object):
    given = Cluster.model_validate({"gpus_per_node": 0, **keys})
    return asked.compare(given, answers or known(), lambda key: key)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"partition": "low", "gpus_per_node": 4, "nodes": 1, "constraint": "a100&ib", "mem": "60 GB"},
        {"partition": "high", "time": "4 h", "account": "vision", "qos": "normal", "mem": "3 GB"},
        {"partition": "high,low", "time": "2 d"},  # fits one of them
        {"constraint": "[a100*1&ib*1]"},  # more than can be evaluated
        {"constraint": "a100|ib"},
        {"nodes": "1-9"},  # fewer will do
    ],
)
def test_what_the_cluster_has_is_no_problem(keys: dict[str, object]) -> None:
    found = compare(**keys)
    assert (found.errors, found.warnings, found.unchecked) == ([], [], [])
    assert found.summary[0].startswith("partition: ")


def test_a_feature_that_no_node_has_is_refused_among_others_too() -> None:
    for constraint in ("nowhere|ib", "[nowhere*1&ib*1]", "nowhere"):
        (error,) = compare(constraint=constraint).errors
        assert (
            error == "cluster.constraint: no node of partition low has 'nowhere'; its features are a100, ib"
        )


def test_nodes_that_are_down_are_waited_for() -> None:
    found = compare(nodes=4)
    assert found.errors == []
    assert found.warnings == [
        "cluster.nodes: 3 of the 4 nodes of partition low are up, the others drained: the job waits for them"
    ]


def test_nodes_that_fit_each_wish_but_not_all() -> None:
    (error,) = compare(nodes=3, mem="7 GB", cpus_per_task=8, constraint="a100|ib").errors
    assert error.startswith("cluster.constraint: too few nodes of partition low have 'a100|ib'")
    other = known(
        nodes=slurm.parse_nodes(
            "n1|idle|low*|8|9000|(null)|(null)|none\nn2|idle|low*|16|100|(null)|(null)|none\n"
        )
    )
    (error,) = compare(other, mem="5 GB", cpus_per_task=16).errors
    assert "0 of the 2 nodes of partition low have all that cpus_per_task, mem" in error


def test_what_does_not_answer_is_said_where_the_recipe_needs_it() -> None:
    silent = Known(
        silent=dict.fromkeys(("partitions", "nodes", "config", "associations", "qos"), "no sacctmgr")
    )
    assert compare(silent).unchecked == ["cluster.partition (no sacctmgr)"]
    assert compare(silent, account="a", qos="b").unchecked == [
        "cluster.partition (no sacctmgr)",
        "cluster.account (no sacctmgr)",
        "cluster.qos (no sacctmgr)",
    ]
    without_accounting = known(associations=None, qos=None, silent={"associations": "none", "qos": "none"})
    assert compare(without_accounting).unchecked == []


def test_accounts_count_only_where_slurm_enforces_them() -> None:
    assert compare(account="nobody").errors
    assert compare(known(config={"AccountingStorageEnforce": "none"}), account="nobody").errors == []


def test_preemption_is_described_and_a_save_that_does_not_fit_is_warned_of() -> None:
    answers = known()
    by_name = {part.name: part for part in answers.partitions or ()}
    fits = preemption.compare(by_name["low"], answers, 10, preemption.Saving(4.0, 1.0, "measured"))
    assert fits.warnings == []
    assert fits.summary == [
        "preemption: PreemptMode=REQUEUE, GraceTime 10 s, KillWait 30 sec, JobRequeue=0 (jobs are submitted "
        "with --requeue)",
        "saves: a save takes 4.0 s and a step 1.0 s (measured); a preemption leaves 10 s",
    ]
    (warning,) = preemption.compare(
        by_name["low"], answers, 10, preemption.Saving(11.0, 0.0, "estimated")
    ).warnings
    assert "loses the steps since the last checkpoint; save more often (checkpoint.every)" in warning
    (warning,) = preemption.compare(by_name["old"], answers, 30, None).warnings
    assert "cancelled at a preemption (PreemptMode=CANCEL, GraceTime 0): submit the run again" in warning


def test_what_the_environment_overrides_is_said() -> None:
    cluster = Cluster(partition="low", qos="normal")
    seen, said = of_environment(
        cluster, {"SBATCH_PARTITION": "high", "SBATCH_QOS": "normal", "SBATCH_ACCOUNT": "a"}
    )
    assert (seen.partition, seen.qos, seen.account) == ("high", "normal", "a")
    assert said == [
        "cluster.partition: sbatch takes SBATCH_PARTITION=high of the environment instead; unset "
        "SBATCH_PARTITION"
    ]
    inside = {"SBATCH_PARTITION": "high", "SLURM_JOB_ID": "7"}
    assert of_environment(cluster, inside) == (cluster, [])


def test_the_arguments_of_sbatch() -> None:
    flags = {"time": 60, "setup": ["a"], "additional_parameters": {"requeue": True, "nodes": "1-2"}}
    assert sbatch_arguments(flags) == ["--time=60", "--requeue", "--nodes=1-2"]
