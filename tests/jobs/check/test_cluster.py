"""The section `cluster` against what SLURM answers."""

import pytest

from clipcluster.recipe.sections.cluster import Cluster
from jobs.check import cluster as asked
from jobs.check import preemption
from jobs.check.known import Known, ask
from jobs.submit.placement import of_environment, sbatch_arguments
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
        {"gpus_per_node": 4, "gpu_type": "A100", "reservation": "workshop"},
        {"container": {"runtime": "apptainer", "image": "torch.sif"}},
        {"nodes": "1-9"},  # fewer will do
        {"time": "3 d", "qos": "long"},  # which allows more than the partition
        {"partition": "high", "time": "1 h", "account": "Vision", "qos": "Normal"},  # SLURM ignores the case
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


def test_a_site_may_choose_the_partition_itself() -> None:
    several = [part for part in known().partitions or () if not part.default]
    (error,) = compare(known(partitions=several)).errors
    assert error == "cluster.partition: there is no default; set it to one of high, old"
    routed = compare(known(partitions=several, config={"JobSubmitPlugins": "lua"}))
    assert (routed.errors, routed.warnings, routed.summary) == ([], [], [])


def test_the_nodes_that_a_constraint_leaves() -> None:
    answers = known()
    low = next(part for part in answers.partitions or () if part.name == "low")
    asked_for = Cluster(gpus_per_node=1, constraint="ib&a100")
    assert [node.name for node in asked.fitting_nodes(asked_for, low, answers)] == ["g1", "g2"]
    asked_for = Cluster(gpus_per_node=0)
    assert len(asked.fitting_nodes(asked_for, low, answers)) == 4


def test_an_answer_that_cannot_be_read_is_none(programs) -> None:
    """Programs of another SLURM: one prints words where numbers were, one nothing, one fails."""
    programs(
        sinfo="echo 'n1|idle|low*|many|8000|(null)|(null)|none'",
        srun="echo --container-image",
        scontrol="test $1 = --all || echo 'KillWait = 30 sec'",
        sacctmgr="echo 'You are not running a supported accounting_storage plugin' >&2; exit 1",
    )
    found = ask(slurm.Slurm())
    assert (found.partitions, found.nodes, found.config) == (None, None, {"KillWait": "30 sec"})
    assert found.silent == {
        "nodes": "SLURM's answer cannot be read: invalid literal for int() with base 10: 'many'",
        "partitions": "SLURM lists no partitions",
        **dict.fromkeys(("associations", "qos"), "You are not running a supported accounting_storage plugin"),
    }
    assert compare(found).unchecked == ["cluster.partition (SLURM lists no partitions)"]


def test_gpus_of_a_type_are_counted_apart() -> None:
    (error,) = compare(gpus_per_node=5, gpu_type="a100", cpus_per_task=1).errors
    assert error.endswith("5 of type a100 requested, and nodes of partition low have 4; set it to at most 4")


def test_reservations_and_containers_count_where_they_are_asked_for() -> None:
    silent = known(reservations=None, pyxis=None, silent={"reservations": "no scontrol", "pyxis": "no srun"})
    assert compare(silent).unchecked == []
    asks = compare(silent, reservation="workshop", container={"runtime": "pyxis", "image": "x"})
    assert asks.unchecked == ["cluster.reservation (no scontrol)", "cluster.container.runtime (no srun)"]


def test_nodes_that_are_down_are_waited_for() -> None:
    found = compare(nodes=4)
    assert found.errors == []
    assert found.warnings == [
        "cluster.nodes: 3 of the 4 nodes of partition low are up, the others drained: the job waits for them"
    ]


def test_the_default_quality_of_service_counts_where_none_is_asked_for() -> None:
    own = slurm.parse_associations("vision||normal,long|long|gpus\ncommon||normal|normal|gpus\n")
    assert compare(known(associations=own), time="3 d").errors == []
    assert compare(known(associations=own), time="3 d", account="vision").errors == []
    elsewhere = slurm.parse_associations("vision|high|normal,long|long|gpus\n")
    assert compare(known(associations=elsewhere), time="3 d").errors
    for keys in ({"account": "common"}, {"qos": "normal"}):
        (error,) = compare(known(associations=own), time="3 d", **keys).errors
        assert error.startswith("cluster.time: 3 d requested")


def test_a_database_of_several_clusters_is_asked_about_this_one(programs) -> None:
    programs(
        scontrol="echo 'ClusterName = GPUs'",
        sacctmgr="test $3 = qos || printf 'vision||normal||gpus\ncommon||long||cpus\n'",
    )
    assert [each.account for each in ask(slurm.Slurm()).associations or ()] == ["vision"]


def test_too_many_nodes_hide_nothing_else() -> None:
    found = compare(nodes=9, cpus_per_task=17, mem="65 GB", gpus_per_node=5, constraint="nowhere")
    keys = [error.partition(": ")[0] for error in found.errors]
    names = ("nodes", "cpus_per_task", "mem", "gpus_per_node", "constraint")
    assert keys == [f"cluster.{name}" for name in names]
    has = ("CPUs are 85 on a node, and nodes of partition low have 16", "have 64000 MB", "have 4; set it to")
    assert all(text in error for text, error in zip(has, found.errors[1:4], strict=True))
    (error,) = compare(nodes=9, cpus_per_task=4, gpus_per_node=1).errors  # some nodes have that
    assert error.startswith("cluster.nodes: 9 requested")


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
    never = preemption.compare(by_name["high"], answers, 10, preemption.Saving(11.0, 0.0, "estimated"))
    assert (never.warnings, never.summary[1]) == ([], "saves: a save takes 11.0 s (estimated)")
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
    _, (unset,) = of_environment(cluster, {"SBATCH_NO_REQUEUE": "1"})
    assert unset == (
        "environment: sbatch takes SBATCH_NO_REQUEUE=1 instead of what is submitted; unset SBATCH_NO_REQUEUE"
    )
    names = ("SBATCH_JOB_NAME", "SBATCH_OUTPUT", "SBATCH_ERROR", "SBATCH_CLUSTERS")
    assert len(of_environment(cluster, dict.fromkeys(names, "x"))[1]) == 4
    inside = {"SBATCH_PARTITION": "high", "SLURM_JOB_ID": "7"}
    assert of_environment(cluster, inside) == (cluster, [])


def test_the_arguments_of_sbatch() -> None:
    flags = {"time": 60, "setup": ["a"], "additional_parameters": {"requeue": True, "nodes": "1-2"}}
    assert sbatch_arguments(flags) == ["--time=60", "--requeue", "--nodes=1-2"]
