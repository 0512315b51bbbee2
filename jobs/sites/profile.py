"""A site profile from what SLURM says: every key in its place, what is unknown or a choice as a comment."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator

from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.recipe.units import Memory, Time
from jobs.check.cluster import SHOWN, some
from jobs.sites.cluster import Kind, Seen
from tools.slurm import Partition

WIDTH = 110
_COLUMN = 34  # where the remarks begin
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_NO_NODES = "SLURM shows no nodes of the partition"
_CONS_TRES = "select/cons_tres"  # the plugin that knows GPUs per node


def text(name: str, seen: Seen, asked: str | None) -> str:
    """The profile NAME.yaml of the partition `asked` for, else the default one. Raises UserError."""
    chosen = seen.partition(asked)
    kinds = seen.kinds(chosen)
    lines = [
        *_paragraph(
            f"The cluster {seen.setting('ClusterName')} (Slurm {seen.setting('SLURM_VERSION')}), as scontrol "
            "and sinfo describe it. Lines that are commented out are choices, or examples of what SLURM does "
            "not report; a recipe and the command line override all of it. Then: clipcluster site check "
            f"{name}"
        ),
        *(
            line
            for what, why in seen.known.silent.items()
            for line in _paragraph(f"No answer: {what} ({why})")
        ),
        "#",
        *(line for part in seen.partitions[:SHOWN] for line in _about(part, seen)),
        "cluster:",
        *_place(seen, chosen),
        *_each_node(seen, chosen, kinds),
        *_times(seen, chosen),
        *_rights(seen, chosen),
        *_surroundings(seen),
    ]
    return "\n".join(lines) + "\n"


def _paragraph(words: str, indent: str = "") -> list[str]:
    plain = " ".join(words.split())
    return textwrap.wrap(plain, WIDTH, initial_indent="# " + indent, subsequent_indent="# " + indent)


def _row(key: str, value: str, remark: str, *, known: bool) -> str:
    """One key; as a comment unless its value is known and right for everybody."""
    start = f"  {'' if known else '# '}{key}: {value}"
    return f"{start:<{_COLUMN}} # {' '.join(remark.split())}" if remark else start


def _value(word: str) -> str:
    """A text as YAML has it; quoted where it could be read as something else."""
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", word) and word.lower() not in ("null", "true", "false")
    return word if plain else json.dumps(word)


def _about(part: Partition, seen: Seen) -> list[str]:
    """A partition, for the reader: its nodes, its time limit, what becomes of a preempted job."""
    kinds = seen.kinds(part)
    what = "; ".join(_described(kind, kinds) for kind in kinds[:SHOWN]) or _NO_NODES
    state = "" if part.state == "UP" else f", {part.state}"
    mode = part.preempt_mode or seen.setting("PreemptMode", "OFF")
    evicted = "" if mode == "OFF" else f"; preempted: {mode}, {part.grace_seconds} s"
    default = " (default)" if part.default else ""
    return _paragraph(f"{part.name}{default}{state}: {what}; {_limit(part)}{evicted}", "  ")


def _described(kind: Kind, kinds: list[Kind]) -> str:
    """How many nodes, what each has, and the features that not every kind has."""
    gpus = "".join(f", {each.count} GPUs {each.type}".rstrip() for each in kind.node.gpus)
    own = [word for word in kind.node.features if any(word not in other.node.features for other in kinds)]
    features = f", features: {some(own)}" if own else ""
    return f"{kind.count} x {kind.node.cpus} CPUs, {Memory(kind.node.memory_mb)}{gpus}{features}"


def _place(seen: Seen, part: Partition) -> Iterator[str]:
    """The partition, and how many nodes a job must have there."""
    others = [other.name for other in seen.partitions if other.name != part.name]
    yield _row("partition", _value(part.name), f"also: {some(others)}" if others else "", known=True)
    if part.min_nodes > 1:
        yield _row("nodes", str(part.min_nodes), "the fewest that a job may have there", known=True)


def _each_node(seen: Seen, part: Partition, kinds: list[Kind]) -> Iterator[str]:
    """What a job asks of a node: all that the most frequent kind has, of those with GPUs if there are any."""
    cpus, gpus, megabytes = 4, 1, 0
    unlike, of_cpus = (f"not known: {_NO_NODES}",) * 2
    if kinds:
        cpus, gpus, megabytes = kinds[0].node.cpus, kinds[0].node.gpu_count, kinds[0].node.memory_mb
        few = sorted({kind.node.gpu_count for kind in kinds})
        unlike = "" if gpus else "no node has any"
        if len(few) > 1:
            unlike = f"nodes have {', '.join(map(str, few))}"
        of_cpus = "a node's CPUs by its ranks"
    yield _row("gpus_per_node", str(gpus), unlike, known=bool(kinds))
    types = sorted({each.type for kind in kinds for each in kind.node.gpus if each.type})
    if types:
        yield _row("gpu_type", _value(types[0]), f"any; there are {some(types)}", known=False)
    if "gpu" in seen.setting("GresTypes"):
        old = seen.setting("SelectType", _CONS_TRES) != _CONS_TRES
        yield _row("gpus_by", "gres", "where sbatch does not know --gpus-per-node", known=old)
    yield _row("cpus_per_task", str(max(1, cpus // max(1, gpus))), of_cpus, known=bool(kinds))
    usual = {key: seen.setting(key, "UNLIMITED") for key in ("DefMemPerNode", "DefMemPerCPU", "DefMemPerGPU")}
    limits = ", ".join(f"{key}={value} MB" for key, value in usual.items() if value.isdecimal())
    memory, whose = (str(Memory(megabytes)), "all of a node's") if megabytes else ("64 GB", "of a node")
    yield _row("mem", memory, f"{whose}; without it {limits or 'what SLURM gives'}", known=False)
    yield _row("exclusive", "true", "whole nodes" + ", as here always" * part.exclusive, known=False)


def _times(seen: Seen, part: Partition) -> Iterator[str]:
    """Of an attempt: its limit, and what a preemption leaves of it."""
    yield _time(part)
    wait = seen.setting("KillWait")
    remark = f"found at each submission from GraceTime {part.grace_seconds} s and KillWait {wait}"
    yield _row("grace", "30 s", remark, known=False)


def _time(part: Partition) -> str:
    """The time limit, where the partition's is shorter than that of a recipe which says nothing."""
    usual = Cluster().time
    if part.max_seconds is not None and part.max_seconds < usual.seconds:
        return _row("time", str(Time(part.max_seconds)), "the partition's limit", known=True)
    return _row("time", str(usual), _limit(part), known=False)


def _limit(part: Partition) -> str:
    return "no time limit" if part.max_seconds is None else f"at most {Time(part.max_seconds)}"


def _rights(seen: Seen, part: Partition) -> Iterator[str]:
    """Accounts, qos, features and reservations."""
    own = seen.known.associations
    if not own:
        why = "sacctmgr gave no answer" if own is None else "sacctmgr shows none of yours"
        yield _row("account", "my-project", why, known=False)
        yield _row("qos", "normal", "", known=False)
    else:
        fitting = [one for one in own if one.partition in ("", part.name)] or own
        accounts = list(dict.fromkeys(one.account for one in fitting))
        remark = "your only one" if len(accounts) == 1 else f"yours: {some(accounts)}"
        yield _row("account", _value(accounts[0]), remark, known=len(accounts) == 1)
        mine = list(dict.fromkeys(qos for one in fitting for qos in one.qos))
        yield _row("qos", _value((mine or ["normal"])[0]), f"yours: {some(mine)}", known=False)
    features = list(dict.fromkeys(word for kind in seen.kinds(part) for word in kind.node.features))
    remark = f"nodes have {some(features)}" if features else "no node of the partition has features"
    if not seen.kinds(part):
        remark = _NO_NODES
    yield _row("constraint", _value(features[0]) if features else "FEATURE", remark, known=False)
    there = seen.known.reservations
    remark = "scontrol gave no answer" if there is None else some(there)
    yield _row("reservation", "NAME", remark, known=False)


def _surroundings(seen: Seen) -> Iterator[str]:
    """Network, shell lines, variables, container: what no program of SLURM tells."""
    first = seen.interfaces[0] if seen.interfaces else "ib0"
    remark = f"of this machine: {', '.join(seen.interfaces) or 'none'}; site check shows those of the nodes"
    yield _row("interface", _value(first), remark, known=False)
    yield "  # setup:                          # shell lines before Python starts; the shell reads ${NAME}"
    yield f"  #   - module load {' '.join(seen.modules) or 'cuda'}"
    yield "  # environment:                    # variables of the job; ${NAME} is the submitting shell's"
    yield "  #   NCCL_IB_HCA: mlx5"
    for name in _PROXIES:
        yield f'  #   {name}: "${{{name}:-}}"'
    yield "  #   TRITON_CACHE_DIR: /tmp/triton"
    runtime = seen.runtimes[0] if seen.runtimes else "apptainer"
    found = f"found here: {', '.join(seen.runtimes) or 'neither apptainer nor pyxis'}"
    yield f"  # container:                      # {found}"
    yield f"  #   runtime: {runtime}"
    yield "  #   image: /images/torch.sif"
    yield "  #   mounts: [/data]"
