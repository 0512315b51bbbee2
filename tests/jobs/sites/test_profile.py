"""`site new`: a profile from what SLURM says, which loads as it was written."""

import re

import pytest

from clipcluster.errors import UserError
from clipcluster.recipe.load import load_cluster
from jobs.check.known import Known
from jobs.sites import profile
from jobs.sites.cluster import Seen
from tools import slurm

PARTITIONS = """\
PartitionName=short
   AllocNodes=ALL Default=NO GraceTime=0 MaxTime=01:30:00 Nodes=g[1-2] OverSubscribe=EXCLUSIVE
   PreemptMode=OFF State=UP
PartitionName=gpu
   AllocNodes=ALL Default=YES GraceTime=60 MaxTime=2-00:00:00 Nodes=g[1-3],c1 OverSubscribe=NO
   PreemptMode=REQUEUE State=UP
PartitionName=old
   AllocNodes=ALL Default=NO GraceTime=0 MaxTime=UNLIMITED Nodes=c1 PreemptMode=OFF State=DOWN
"""
NODES = """\
g1|idle|gpu*|64|512000|a100,ib|gpu:a100:4(S:0-1)|none
g1|idle|short|64|512000|a100,ib|gpu:a100:4(S:0-1)|none
g2|mixed|gpu*|64|512000|a100,ib|gpu:a100:4(S:0-1)|none
g3|mixed|gpu*|96|1024000|h100|gpu:h100:8|none
c1|down*|gpu*|32|128000|(null)|(null)|broken
c1|down*|old|32|128000|(null)|(null)|broken
"""
SETTINGS = {
    "ClusterName": "hexa",
    "SLURM_VERSION": "23.02.6",
    "GresTypes": "gpu",
    "SelectType": "select/cons_tres",
    "KillWait": "30 sec",
    "DefMemPerCPU": "4000",
}


def seen(**changed):
    answers = {
        "partitions": slurm.parse_partitions(PARTITIONS),
        "nodes": slurm.parse_nodes(NODES),
        "config": SETTINGS,
        "associations": slurm.parse_associations("lab||normal,high||gpus\n"),
        "reservations": ["maintenance"],
        "pyxis": True,
    }
    return Seen(Known(**{**answers, **changed}), ("eth0", "ib0"), ("cuda/12.4",), ("pyxis",))


@pytest.fixture
def written(tmp_path):
    """The cluster section of a profile, and its text."""

    def written(facts, partition=None):
        text = profile.text("here", facts, partition)
        folder = tmp_path / "clipcluster" / "sites"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "here.yaml").write_text(text)
        return load_cluster(environ={"XDG_CONFIG_HOME": str(tmp_path)}, site="here"), text

    return written


def test_what_slurm_says_is_set_and_what_it_does_not_is_a_comment(written):
    cluster, text = written(seen())
    assert cluster.model_fields_set == {"partition", "gpus_per_node", "cpus_per_task", "account"}
    assert (cluster.partition, cluster.gpus_per_node, cluster.cpus_per_task) == ("gpu", 4, 16)
    assert cluster.account == "lab"
    for part in (
        "# The cluster hexa (Slurm 23.02.6)",
        "gpu (default): 2 x 64 CPUs, 500 GB, 4 GPUs a100, features: a100, ib; "
        "1 x 96 CPUs, 1000 GB, 8 GPUs h100, features: h100; 1 x 32 CPUs, 125 GB; at most 2 d",
        "short: 1 x 64 CPUs, 500 GB, 4 GPUs a100; at most 90 min",
        "at most 2 d; preempted: REQUEUE, 60 s",
        "old, DOWN: 1 x 32 CPUs",
        "# nodes have 0, 4, 8",
        "# gpu_type: a100 # any; there are a100, h100",
        "# gpus_by: gres",
        "# mem: 500 GB # all of a node's; without it DefMemPerCPU=4000 MB",
        "# time: 4 h # at most 2 d",
        "from GraceTime 60 s and KillWait 30 sec",
        "# qos: normal # yours: normal, high",
        "# constraint: a100 # nodes have a100, ib, h100",
        "# reservation: NAME # maintenance",
        "# interface: eth0 # of this machine: eth0, ib0",
        "# - module load cuda/12.4",
        "# container: # found here: pyxis",
        "# runtime: pyxis",
    ):
        assert part in re.sub(r"[ #]*\n# +", " ", re.sub(" +", " ", text)) or part in re.sub(" +", " ", text)
    assert max(map(len, text.splitlines())) <= 160


def test_every_commented_key_loads_once_it_is_uncommented(written, monkeypatch):
    _, text = written(seen())
    keys = re.findall(r"^  # (\w+): \S", text, re.MULTILINE)
    assert len(keys) == 10
    lines = [line.replace("  # ", "  ", 1) if line.startswith("  # ") else line for line in text.splitlines()]
    monkeypatch.setattr(profile, "text", lambda *given: "\n".join(lines))
    cluster, _ = written(seen())
    assert cluster.model_fields_set == {
        *("partition", "gpus_per_node", "cpus_per_task", "account", "setup", "environment", "container"),
        *keys,
    }
    assert cluster.setup == ("module load cuda/12.4",)
    assert cluster.container.runtime == "pyxis"


def test_another_partition_and_an_old_cluster(written):
    cluster, text = written(seen(config={**SETTINGS, "SelectType": "select/cons_res"}), "short")
    assert (cluster.partition, str(cluster.time), cluster.gpus_by) == ("short", "90 min", "gres")
    assert "whole nodes, as here always" in text
    with pytest.raises(UserError, match="--partition gpus: this cluster has short, gpu, old"):
        written(seen(), "gpus")


def test_nodes_that_differ_only_by_a_feature_are_told_apart(written):
    nodes = "n1|idle|all|4|8000|avx2|(null)|none\nn2|idle|all|4|8000|avx2,fast|(null)|none\n"
    _, text = written(
        seen(
            partitions=slurm.parse_partitions("PartitionName=all Nodes=n[1-3] State=UP\n"),
            nodes=slurm.parse_nodes(nodes + "n3|idle|all|4|8000|avx2|(null)|none\n"),
        )
    )
    assert "all: 2 x 4 CPUs, 8000 MB; 1 x 4 CPUs, 8000 MB, features: fast; no time limit" in text


def test_a_cluster_that_says_little(written):
    partition = "PartitionName=null Nodes=n1 State=UP MinNodes=2\n"
    silent = {"nodes": "sinfo gave no answer", "associations": "no sacctmgr on the PATH"}
    answers = Known(partitions=slurm.parse_partitions(partition), silent=silent)
    cluster, text = written(Seen(answers, (), (), ()))
    assert cluster.model_fields_set == {"partition", "nodes"}
    assert (cluster.partition, str(cluster.nodes)) == ("null", "2")
    for part in (
        "# The cluster ? (Slurm ?)",
        "# No answer: nodes (sinfo gave no answer)\n# No answer: associations (no sacctmgr on the PATH)\n",
        "null: SLURM shows no nodes of the partition; no time limit",
        "# not known: SLURM shows no nodes of the partition",
        "# account: my-project            # sacctmgr gave no answer",
        "# reservation: NAME              # scontrol gave no answer",
    ):
        assert part in text


def test_several_accounts_are_a_choice(written):
    cluster, text = written(
        seen(associations=slurm.parse_associations("lab||normal||gpus\n2024-x|gpu|||gpus\n"))
    )
    assert cluster.account is None
    assert "yours: lab, 2024-x" in text
    only = slurm.parse_associations("2024-x||007||gpus\n")
    cluster, text = written(seen(associations=only))
    assert (cluster.account, '"007"' in text) == ("2024-x", True)


def test_only_keys_of_the_cluster_can_be_given():
    with pytest.raises(UserError, match=r"optim\.lr=1: only keys of the section cluster count here"):
        load_cluster(["optim.lr=1"])
    with pytest.raises(UserError, match="write key=value, such as nodes=1"):
        load_cluster(["four"])
