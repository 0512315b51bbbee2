"""Whether what a recipe asks of the cluster is there: partition, limits, nodes, accounts. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from clipcluster.check.plain import Findings
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.recipe.units import Memory, Nodes, Time
from clipcluster.text import counted, did_you_mean
from jobs.check.known import Known
from tools.slurm import Node, Partition

Place = Callable[[str], str]
CLOSED = ("DRAIN", "INACTIVE")  # states of a partition that accepts no jobs
UP = frozenset(  # or brought up for a job
    {"idle", "mixed", "allocated", "completing", "planned", "reserved"}
    | {"powering_up", "powering_down", "powered_down", "power_up", "power_down"}
)
SHOWN = 8  # names in a message


class Problem(NamedTuple):
    """What is wrong with a key of the section `cluster`, and what to do."""

    key: str
    text: str


def compare(cluster: Cluster, known: Known, place: Place) -> Findings:
    """The findings about a recipe's section `cluster`; `place` says where a key was written.

    What SLURM did not answer is in `unchecked`, as far as the recipe depends on it.
    """
    found = Findings()
    for key, reason in _unanswered(cluster, known):
        found.unchecked.append(f"{key} ({reason})")
    chosen, problems = _partitions(cluster, known)
    if chosen:
        by_partition = [list(_of_partition(cluster, part, known)) for part in chosen]
        fewest: list[Problem] = min(by_partition, key=len)  # of several partitions SLURM takes one that fits
        problems += fewest
        found.summary += [_described(part, _nodes_of(part, known)) for part in chosen]
        if not problems:
            fitting = next(part for part, own in zip(chosen, by_partition, strict=True) if not own)
            found.warnings += [f"{place(key)}: {text}" for key, text in _waits(cluster, fitting, known)]
    problems += [*_of_accounting(cluster, known), *_of_surroundings(cluster, known)]
    found.errors += [f"{place(key)}: {text}" for key, text in problems]
    return found


def partition_of(cluster: Cluster, known: Known) -> Partition | None:
    """The partition that a job is most likely to run in: the first one that fits."""
    chosen = _partitions(cluster, known)[0]
    return min(chosen, key=lambda part: len(list(_of_partition(cluster, part, known))), default=None)


def _unanswered(cluster: Cluster, known: Known) -> Iterator[tuple[str, str]]:
    """The keys that could not be compared, with the reason."""
    needs = {
        "partitions": ("cluster.partition", True),
        "nodes": ("cluster.nodes", known.partitions is not None),
        "associations": ("cluster.account", cluster.account is not None),
        "qos": ("cluster.qos", cluster.qos is not None),
        "reservations": ("cluster.reservation", cluster.reservation is not None),
        "pyxis": ("cluster.container.runtime", _uses_pyxis(cluster)),
    }
    for name, (key, needed) in needs.items():
        if needed and name in known.silent:
            yield key, known.silent[name]


def _partitions(cluster: Cluster, known: Known) -> tuple[list[Partition], list[Problem]]:
    """The partitions that a job may run in, and what is wrong with their names."""
    if known.partitions is None:
        return [], []
    by_name = {part.name: part for part in known.partitions}
    key, there = "cluster.partition", some(sorted(by_name))
    if cluster.partition is None:
        default = [part for part in known.partitions if part.default]
        routed = (known.config or {}).get("JobSubmitPlugins", "(null)") not in ("(null)", "")
        if default or routed:  # else the site's own plugin may choose one
            return default, []
        return [], [Problem(key, f"there is no default; set it to one of {there}")]
    names = cluster.partition.split(",")
    unknown = [
        Problem(key, f"there is no partition {name!r}{did_you_mean(name, by_name)}; there are {there}")
        for name in names
        if name not in by_name
    ]
    return [by_name[name] for name in names if name in by_name], unknown


def _of_partition(cluster: Cluster, part: Partition, known: Known) -> Iterator[Problem]:
    """What a partition does not allow, or does not have."""
    name, nodes = f"partition {part.name}", cluster.nodes
    if part.state in CLOSED:
        others = some([other.name for other in known.partitions or () if other.state == "UP"])
        yield Problem("cluster.partition", f"{name} is {part.state}: it accepts no jobs; use one of {others}")
    seconds = 60 * cluster.time.minutes
    unbound = _flag(cluster, part, known, "PartitionTimeLimit")
    if part.max_seconds is not None and seconds > part.max_seconds and not unbound:
        yield Problem("cluster.time", too_long(cluster.time, f"{name} allows (MaxTime)", part.max_seconds))
    unbound = _flag(cluster, part, known, "PartitionMaxNodes")
    if part.max_nodes is not None and nodes.least > part.max_nodes and not unbound:
        yield Problem(
            "cluster.nodes",
            f"{nodes} requested, and {name} allows a job {part.max_nodes}; set it to at most that",
        )
    if nodes.most < part.min_nodes and not _flag(cluster, part, known, "PartitionMinNodes"):
        yield Problem(
            "cluster.nodes",
            f"{nodes} requested, and jobs in {name} have at least {part.min_nodes}; set it to that or more",
        )
    yield from _listed("account", cluster.account, part.accounts, part.denied_accounts, name)
    yield from _listed("qos", cluster.qos, part.qos, part.denied_qos, name)
    if cluster.mem and part.max_memory_mb is not None and cluster.mem.megabytes > part.max_memory_mb:
        most = Memory(part.max_memory_mb)
        yield Problem("cluster.mem", f"{cluster.mem} requested, and {name} allows {most}; set it to that")
    if known.nodes is not None:
        yield from _of_nodes(cluster, part, _nodes_of(part, known), known)


def _flag(cluster: Cluster, part: Partition, known: Known, name: str) -> bool:
    """Whether the job's quality of service lets it exceed this limit of a partition.

    It is the one that is given, or a default one of the user's accounts.
    """
    account, every = cluster.account and cluster.account.lower(), known.qos or {}
    mine = [each for each in known.associations or () if each.partition in ("", part.name)]
    defaults = [each.default_qos for each in mine if account in (None, each.account)]
    asked = [cluster.qos.lower()] if cluster.qos else defaults
    return any(name in every[qos].flags for qos in asked if qos in every)


def too_long(time: Time, who: str, seconds: int) -> str:
    """What is wrong with a time above a limit of so many seconds."""
    most = Time(float(seconds))
    return f"{time} requested, and {who} {most}; set it to at most that: a longer run is requeued and resumes"


def _listed(
    key: str, given: str | None, allowed: Sequence[str] | None, denied: Sequence[str], name: str
) -> Iterator[Problem]:
    """An account or quality of service that a partition does not take."""
    if given is None:
        return
    # SLURM keeps these names in lower case
    if allowed is not None and given.lower() not in map(str.lower, allowed):
        yield Problem(f"cluster.{key}", f"{name} does not take {given!r}; it takes {some(allowed)}")
    elif given.lower() in map(str.lower, denied):
        yield Problem(f"cluster.{key}", f"{name} does not take {given!r}; choose another {key} or partition")


def _nodes_of(part: Partition, known: Known) -> list[Node]:
    return [node for node in known.nodes or () if part.name in node.partitions]


def fitting_nodes(cluster: Cluster, part: Partition, known: Known) -> list[Node]:
    """The nodes of a partition that a job may run on, as far as their features and GPUs tell."""
    has_gpus, has = _has_gpus(cluster), has_features(cluster.constraint)
    return [node for node in _nodes_of(part, known) if has_gpus(node) and has(node)]


def _of_nodes(cluster: Cluster, part: Partition, nodes: Sequence[Node], known: Known) -> Iterator[Problem]:
    """What too few nodes of a partition have."""
    least, name = cluster.nodes.least, f"partition {part.name}"
    if not nodes:
        return  # cloud nodes that appear with a job; sbatch knows
    if least > len(nodes):
        has = counted(len(nodes), "node")
        yield Problem(
            "cluster.nodes", f"{least} requested, and {name} has {has}; set it to at most {len(nodes)}"
        )
        wanted = cluster.model_copy(update={"nodes": Nodes(1, 1)})
        yield from _of_nodes(wanted, part, nodes, known)  # what no node has is wrong for fewer, too
        return
    needs = {
        "cluster.cpus_per_task": (_has_cpus(cluster), _too_many_cpus),
        "cluster.mem": (_has_memory(cluster), _too_much_memory),
        "cluster.gpus_per_node": (_has_gpus(cluster), _too_many_gpus),
        "cluster.constraint": (has_features(cluster.constraint), _too_few_features),
    }
    found, features = False, {feature for node in known.nodes or () for feature in node.features}
    for key, (fits, wrong) in needs.items():
        # SLURM refuses a feature that it has never heard of, even as one of several alternatives
        unheard = key == "cluster.constraint" and set(features_of(cluster.constraint)) - features
        if unheard or sum(map(fits, nodes)) < least:
            found = True
            yield Problem(key, wrong(cluster, part, nodes, known))
    fitting = [node for node in nodes if all(fits(node) for fits, _ in needs.values())]
    if not found and len(fitting) < least:
        yield Problem(
            "cluster.nodes",
            f"{least} requested, and {len(fitting)} of the {len(nodes)} nodes of {name} have all that "
            "cpus_per_task, mem, gpus_per_node and constraint ask for; ask for fewer nodes, or for less",
        )


def _has_cpus(cluster: Cluster) -> Callable[[Node], bool]:
    return lambda node: node.cpus >= cluster.ranks_per_node * cluster.cpus_per_task


def _has_memory(cluster: Cluster) -> Callable[[Node], bool]:
    return lambda node: cluster.mem is None or node.memory_mb >= cluster.mem.megabytes


def _has_gpus(cluster: Cluster) -> Callable[[Node], bool]:
    return lambda node: _gpus_of_type(cluster, node) >= cluster.gpus_per_node


def _gpus_of_type(cluster: Cluster, node: Node) -> int:
    """How many GPUs of the type that is asked for a node has; without a type, how many it has."""
    wanted = cluster.gpu_type
    return sum(each.count for each in node.gpus if wanted is None or each.type.lower() == wanted.lower())


def features_of(constraint: str | None) -> list[str]:
    """The names of features in a constraint, whatever joins them: a100&ib, [rack1*2|rack2*4]."""
    return re.findall(r"[^\s&|,()\[\]]+", re.sub(r"\*\d+", "", constraint or ""))


def has_features(constraint: str | None) -> Callable[[Node], bool]:
    """Whether a node has the features of a constraint; any has, where that is more than names with & or |."""
    names, signs = set(features_of(constraint)), set(re.findall(r"[&|,*()\[\]]", constraint or ""))
    if signs <= {"&", ","}:
        return lambda node: names <= set(node.features)
    if signs == {"|"}:
        return lambda node: bool(names & set(node.features))
    return lambda node: True


def _too_many_cpus(cluster: Cluster, part: Partition, nodes: Sequence[Node], known: Known) -> str:
    ranks, most = cluster.ranks_per_node, _most([node.cpus for node in nodes], cluster)
    wanted = f"{counted(ranks, 'rank')} x {cluster.cpus_per_task} CPUs are {ranks * cluster.cpus_per_task}"
    fits = f"set it to at most {most // ranks}" if most >= ranks else "lower cluster.tasks_per_node"
    return f"{wanted} on a node, and nodes of partition {part.name} have {most}; {fits}"


def _too_much_memory(cluster: Cluster, part: Partition, nodes: Sequence[Node], known: Known) -> str:
    most = Memory(_most([node.memory_mb for node in nodes], cluster))
    return f"{cluster.mem} requested, and nodes of partition {part.name} have {most}; set it to at most that"


def _too_many_gpus(cluster: Cluster, part: Partition, nodes: Sequence[Node], known: Known) -> str:
    most = _most([_gpus_of_type(cluster, node) for node in nodes], cluster)
    kind = f" of type {cluster.gpu_type}" if cluster.gpu_type else ""
    has = f"nodes of partition {part.name} have {most or 'none'}"
    wanted = f"{cluster.gpus_per_node}{kind} requested, and {has}"
    if most:
        return f"{wanted}; set it to at most {most}"
    types = sorted({each.type or "no type" for node in nodes for each in node.gpus})
    if cluster.gpu_type and types:
        return f"{wanted}; set cluster.gpu_type to what they have: {some(types)}, or leave it out"
    others = {name for node in known.nodes or () if _gpus_of_type(cluster, node) for name in node.partitions}
    if not others:
        return f"{wanted}; SLURM knows of no such GPUs on this cluster: set it to 0 to train on the CPU"
    elsewhere = " or ".join(sorted(others))
    return f"{wanted}; use partition {elsewhere}, or set it to 0 to train on the CPU"


def _too_few_features(cluster: Cluster, part: Partition, nodes: Sequence[Node], known: Known) -> str:
    there = sorted({feature for node in nodes for feature in node.features})
    has = f"its features are {some(there)}" if there else "its nodes have none; remove the key"
    lacking = [name for name in features_of(cluster.constraint) if name not in there]
    if not lacking:
        return f"too few nodes of partition {part.name} have {cluster.constraint!r}; {has}"
    return f"no node of partition {part.name} has {lacking[0]!r}{did_you_mean(lacking[0], there)}; {has}"


def _most(values: Sequence[int], cluster: Cluster) -> int:
    """What as many nodes as are asked for have at least."""
    return sorted(values, reverse=True)[cluster.nodes.least - 1]


def _waits(cluster: Cluster, part: Partition, known: Known) -> Iterator[Problem]:
    """Why a job that fits would not start for now."""
    if part.state == "DOWN":
        yield Problem("cluster.partition", f"partition {part.name} is DOWN: jobs wait until it is up again")
    nodes = _nodes_of(part, known)
    up = [node for node in nodes if node.state in UP and node.responding]
    if nodes and len(up) < cluster.nodes.least:
        states = some(sorted({node.state for node in nodes if node not in up}))
        yield Problem(
            "cluster.nodes",
            f"{len(up)} of the {len(nodes)} nodes of partition {part.name} are up, the others {states}: the "
            "job waits for them",
        )


def _of_accounting(cluster: Cluster, known: Known) -> Iterator[Problem]:
    """An account or quality of service that this user has not, where SLURM refuses jobs for it."""
    enforced = (known.config or {}).get("AccountingStorageEnforce", "none").lower()
    own, account = known.associations or [], cluster.account and cluster.account.lower()
    accounts = sorted({each.account for each in own})
    if account and own and "associations" in enforced and account not in accounts:
        yours = f"{some(accounts)}{did_you_mean(account, accounts)}"
        yield Problem("cluster.account", f"{cluster.account!r} is not one of your accounts, {yours}")
    if cluster.qos is None or known.qos is None:
        return
    qos = cluster.qos.lower()
    used = [each for each in own if account in (None, each.account)]
    usable = sorted({name for each in used for name in each.qos}) or sorted(known.qos)
    if qos not in usable and ("qos" in enforced or qos not in known.qos):
        near = did_you_mean(qos, usable)
        yield Problem("cluster.qos", f"{cluster.qos!r} is not one that you may use, {some(usable)}{near}")
    limit = known.qos[qos].max_seconds if qos in known.qos else None
    if limit is not None and 60 * cluster.time.minutes > limit:
        yield Problem(
            "cluster.time", too_long(cluster.time, f"quality of service {cluster.qos} allows", limit)
        )


def _of_surroundings(cluster: Cluster, known: Known) -> Iterator[Problem]:
    """A reservation that is not there, and a plugin for containers that srun has not."""
    there = known.reservations
    for name in (cluster.reservation or "").split(","):
        if name and there is not None and name not in there:
            near = did_you_mean(name, there)
            yield Problem(
                "cluster.reservation", f"there is no reservation {name!r}{near}; there are {some(there)}"
            )
    if _uses_pyxis(cluster) and known.pyxis is False:
        yield Problem(
            "cluster.container.runtime",
            "srun has no --container-image here, so the plugin pyxis is not installed; use apptainer",
        )


def _uses_pyxis(cluster: Cluster) -> bool:
    return cluster.container is not None and cluster.container.runtime == "pyxis"


def _described(part: Partition, nodes: Sequence[Node]) -> str:
    """A fact: the partition, its limit, and what its nodes have."""
    default = " (the default)" if part.default else ""
    kinds = {(node.cpus, node.memory_mb, node.gpus) for node in nodes}
    each = ""
    if len(kinds) == 1:
        cpus, megabytes, gpus = kinds.pop()
        of_type = [f"{own.count} {own.type or 'GPU'}{' GPUs' if own.type else ''}" for own in gpus]
        each = f" of {', '.join([f'{cpus} CPUs', str(Memory(megabytes)), *of_type])}"
    limit = "no time limit" if part.max_seconds is None else f"at most {Time(float(part.max_seconds))} a job"
    return f"partition: {part.name}{default}, {counted(len(nodes) or len(part.nodes), 'node')}{each}; {limit}"


def some(names: Sequence[str]) -> str:
    """The names, of many the first ones."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "none"
