"""What a site check means: a line for each subject, whether it is right, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from clipcluster.text import counted
from jobs.sites.check import Found

Report = Mapping[str, Any]
SLOW_IMPORT_SECONDS = 60
SLOW_SIGHT_SECONDS = 5
CLOCK_SECONDS = 1.0  # by which clocks may differ
SMALL_SHM_MB = 1024
FASTER = 4  # how much faster another interface must be to be named


@dataclass(frozen=True)
class Finding:
    """One line of the table. An "error" keeps runs from working, a "warning" costs them something."""

    what: str
    kind: Literal["ok", "warning", "error"]
    found: str
    advice: str = ""


def findings(found: Found) -> list[Finding]:
    """All that the check of a site says, in the order in which a job meets it."""
    ranks = [found.ranks[rank] for rank in sorted(found.ranks)]
    lines = [*_reached(found, ranks)]
    if ranks:
        lines += [*_devices(found, ranks), *_software(ranks), _network(found, ranks)]
        lines += [*_folder(ranks), *_clocks(found, ranks), *_reduced(found, ranks)]
    lines += _scontrol(found)
    return lines


def _first_of_nodes(ranks: Sequence[Report]) -> list[Report]:
    """One report of each node."""
    return list({report["node"]: report for report in reversed(ranks)}.values())[::-1]


def _reached(found: Found, ranks: Sequence[Report]) -> Iterator[Finding]:
    """Whether the job ran, and all its ranks reported."""
    nodes = _first_of_nodes(ranks)
    missing = sorted({*range(found.expected)} - {*found.ranks})
    last = f"; its last lines:\n{found.log}" if found.log else ""
    if found.waits:
        advice = (
            "Request less, or another partition (nodes=1, partition=NAME, time=…), in the profile or after "
            'its name; as requested, the job would never start (squeue\'s manual page: "JOB REASON CODES")'
        )
        yield Finding("job", "error", f"job {found.job} does not start: {found.waits}", advice)
        return
    if not ranks:
        ended = found.ended or f"its ranks ended with code {(found.batch or {}).get('code')}"
        advice = "Fix what the last lines say (cluster.setup, the container, a folder missing on the nodes)"
        yield Finding("job", "error", f"job {found.job}: {ended}, and no rank reported{last}", advice)
        return
    if missing:
        lost = f"{counted(len(missing), 'rank')} of {found.expected} did not report ({missing})"
        yield Finding("job", "error", f"job {found.job}: {lost}{last}", "Check their nodes")
    elif killed := [report for report in ranks if not {"done", "error"} & report.keys()]:
        what = (
            f"{counted(len(killed), 'rank')} did not finish (srun's code: {(found.batch or {}).get('code')})"
        )
        advice = "See the lines below; after a preemption or a time limit run the check again"
        yield Finding("job", "error", f"job {found.job}: {what}{last}", advice)
    elif found.ended:
        advice = "Run the check again, in a partition without preemption if there is one"
        yield Finding("job", "warning", f"job {found.job} {found.ended} before the end of the check", advice)
    else:
        what = f"{counted(len(ranks), 'rank')} on {counted(len(nodes), 'node')}"
        yield Finding("job", "ok", f"job {found.job}: {what} ({', '.join(each['node'] for each in nodes)})")


def _devices(found: Found, ranks: Sequence[Report]) -> Iterator[Finding]:
    """What each node has, against what the profile asks for."""
    cluster = found.cluster
    for report in _first_of_nodes(ranks):
        mine = [each for each in ranks if each["node"] == report["node"]]
        devices = [each["device"] for each in mine if "device" in each and not each["device_lacks"]]
        gpus = f", {', '.join(devices)}" if cluster.gpus_per_node and devices else ""
        what = f"{report['cpus']} CPUs a rank, {report['memory_mb'] / 1024:.0f} GB{gpus}"
        kind: Literal["ok", "warning", "error"] = "ok"
        advice = ""
        if lacks := next((each["device"] for each in mine if each.get("device_lacks")), ""):
            kind, what = "error", f"{what}; {lacks}"
            advice = "Check cluster.gpus_by and gpu_type, that torch is a build for the driver, and --nv"
        elif report["cpus"] < cluster.cpus_per_task:
            kind, advice = (
                "warning",
                f"cluster.cpus_per_task is {cluster.cpus_per_task}: the node gives fewer",
            )
        elif report["shm_mb"] < SMALL_SHM_MB:
            kind, what = "warning", f"{what}; /dev/shm has {report['shm_mb']} MB"
            advice = "Loader workers hand batches over there: enlarge it, or set data.workers=0"
        yield Finding(f"node {report['node']}", kind, what, advice)


def _software(ranks: Sequence[Report]) -> Iterator[Finding]:
    """Python, torch, and how long its import takes."""
    for executable in dict.fromkeys(report["executable"] for report in ranks):
        mine = [report for report in ranks if report["executable"] == executable]
        slowest = max((report.get("torch_seconds", 0.0) for report in mine), default=0.0)
        version = next((report["torch"] for report in mine if "torch" in report), None)
        what = f"Python {mine[0]['python']} ({executable}), torch {version or 'not imported'}"
        if version is None:
            error = next((report["error"] for report in mine if "error" in report), "it took too long")
            advice = "Install torch there: the Python of the submission, or cluster.container.python"
            yield Finding("software", "error", f"{what}: {error}", advice)
        elif slowest > SLOW_IMPORT_SECONDS:
            advice = "Put the environment on a faster file system, or into a container image"
            yield Finding("software", "warning", f"{what}, imported in {slowest:.0f} s", advice)
        else:
            yield Finding("software", "ok", f"{what}, imported in {slowest:.0f} s")


def _network(found: Found, ranks: Sequence[Report]) -> Finding:
    """The interfaces of the first node, and which one is used; of one that lacks the profile's, its own."""
    wrong = [report for report in ranks if "interface_error" in report]
    first = next(iter(wrong or ranks))
    named = {
        name: f"{name} {one['address']}{_speed(one['mbit'])}" for name, one in first["interfaces"].items()
    }
    what = ", ".join([*named.values(), *first["infiniband"]]) or "no interface but loopback"
    if wrong:
        advice = "Every node needs it: fix cluster.interface, or exclude the node"
        return Finding("network", "error", f"{what}; {first['interface_error']}", advice)
    address = next((report["address"] for report in ranks if report.get("address")), None)
    used = next((name for name, one in first["interfaces"].items() if one["address"] == address), None)
    if address is None:
        return Finding("network", "ok", what)
    what += f"; the ranks meet at {address}" + (f" ({used})" if used else "")
    faster = _faster(first["interfaces"], used)
    if found.cluster.interface is None and faster:
        return Finding("network", "warning", what, f"{faster} is faster: set cluster.interface: {faster}")
    return Finding("network", "ok", what)


def _speed(mbit: int) -> str:
    return f" ({mbit / 1000:g} Gbit/s)" if mbit else ""


def _faster(interfaces: Mapping[str, Any], used: str | None) -> str | None:
    """An interface that is several times as fast as the one in use, where both speeds are known."""
    mine = interfaces[used]["mbit"] if used else 0
    best = max(interfaces, key=lambda name: int(interfaces[name]["mbit"]), default=None)
    return best if best and mine and interfaces[best]["mbit"] >= FASTER * mine else None


def _folder(ranks: Sequence[Report]) -> Iterator[Finding]:
    """Whether all ranks share the folder of runs, and only one of them can make a name in it."""
    kinds = sorted({report["file_system"] for report in ranks})
    made = [sum(bool(report.get(key)) for report in ranks) for key in ("first_folder", "first_file")]
    what = f"the folder of runs is on {', '.join(kinds)}"
    seen = next((report["seen_after"] for report in ranks if "seen_after" in report), None)
    advice = "Give a folder that all nodes share (--runs, $CLIPCLUSTER_RUNS)"
    if made != [1, 1]:
        said = f"{made[0]} ranks made the same folder, {made[1]} the same file; one of all must"
        yield Finding("shared folder", "error", f"{what}: {said}", advice)
    elif seen is None:
        return  # the ranks did not meet, which is said elsewhere
    elif None in seen:
        late = f"what rank 0 writes is not seen by rank {seen.index(None)}"
        yield Finding("shared folder", "error", f"{what}: {late}", advice)
    elif max(seen) > SLOW_SIGHT_SECONDS:
        late = f"what a rank writes is seen after {max(seen):.1f} s"
        advice = "File attributes are cached for long (NFS: actimeo): attempts start later, status is late"
        yield Finding("shared folder", "warning", f"{what}: {late}", advice)
    else:
        late = f"what a rank writes is seen after {max(seen):.2f} s" if len(seen) > 1 else "one rank alone"
        yield Finding("shared folder", "ok", f"{what}; {late}")


def _clocks(found: Found, ranks: Sequence[Report]) -> Iterator[Finding]:
    """The nodes' clocks against each other, and against the submitter's, as far as they could be bounded."""
    offsets = next((report["clock_offsets"] for report in ranks if "clock_offsets" in report), None)
    advice = "Synchronize the clocks (chrony, ntp): the order of submissions and claims is read from them"
    if offsets is not None and len(offsets) > 1:
        apart = max(offsets) - min(offsets)
        kind: Literal["ok", "warning"] = "warning" if apart > CLOCK_SECONDS else "ok"
        what = f"the nodes' clocks differ by {apart:.3f} s"
        yield Finding("clocks", kind, what, advice if kind == "warning" else "")
    first = ranks[0]
    if first["rank"] not in found.behind or "ahead_at_most" not in first:
        return
    least, most = -found.behind[first["rank"]], first["ahead_at_most"]
    off = least > CLOCK_SECONDS or most < -CLOCK_SECONDS
    what = f"the clock of {first['node']} minus this machine's: {least:+.1f} to {most:+.1f} s"
    yield Finding("clocks", "warning" if off else "ok", what, advice if off else "")


def _reduced(found: Found, ranks: Sequence[Report]) -> Iterator[Finding]:
    """The all-reduce over gloo, and over the devices."""
    if any("interface_error" in report for report in ranks):
        return  # said of the network
    if len(ranks) < 2:
        yield Finding("all-reduce", "warning", "one rank: nothing was reduced", "Check with nodes=2")
        return
    failed = [report for report in ranks if "error" in report and "torch" in report]
    advice = "Set cluster.interface to the network of the nodes, and check for a firewall between them"
    for report in failed[:1]:
        what = f"rank {report['rank']} on {report['node']}: {report['error']}"
        yield Finding("all-reduce", "error", what, advice)
    for kind in ("gloo", "nccl"):
        measured = [report[kind] for report in ranks if kind in report]
        if measured:
            yield _bandwidth(kind, measured, ranks, advice)
    if not found.cluster.gpus_per_node or failed or any("nccl" in report for report in ranks):
        return
    if any(report.get("device_lacks") for report in ranks):
        yield Finding("all-reduce", "error", "not between GPUs: a rank has none", "See the nodes above")
    else:
        what = f"between GPUs: not completed\n{found.log}".strip()
        yield Finding("all-reduce", "error", what, "Run it again with environment.NCCL_DEBUG=INFO")


def _bandwidth(kind: str, measured: Sequence[Report], ranks: Sequence[Report], advice: str) -> Finding:
    slowest = max(measured, key=lambda one: float(one["seconds"]))
    where = f"{counted(len(ranks), 'rank')} on {counted(len(_first_of_nodes(ranks)), 'node')}"
    over = f" over {slowest['network']}" if slowest.get("network") else ""
    what = f"{kind}{over}, {where}: {slowest['bytes'] >> 20} MiB in {1000 * slowest['seconds']:.1f} ms, "
    what += f"{slowest['bus'] / 1e9:.2f} GB/s"
    if not all(one["right"] for one in measured):
        return Finding("all-reduce", "error", f"{what}: the sum is wrong", "Do not train on these nodes")
    if slowest.get("network") == "Socket" and any(report["infiniband"] for report in ranks):
        text = "NCCL does not use InfiniBand: set NCCL_IB_HCA, or add its libraries to the container"
        return Finding("all-reduce", "warning", what, text)
    return Finding("all-reduce", "ok", what)


def _scontrol(found: Found) -> list[Finding]:
    """Whether the batch script reaches SLURM, and may requeue its own job."""
    batch = found.batch
    if batch is None:
        if not found.ranks:
            return []
        advice = "The Python of the submission must be on every node, outside of the container too"
        return [Finding("scontrol", "error", f"the batch script did not report\n{found.log}".strip(), advice)]
    if batch["show"]:
        advice = (
            "Without an answer a scancel looks like a preemption: ask the administrators to install SLURM's "
            "programs on the nodes"
        )
        lines = [Finding("scontrol", "error", f"on {batch['node']}: {batch['show']}", advice)]
    else:
        lines = [Finding("scontrol", "ok", f"answers on {batch['node']} in {batch['seconds']:.2f} s")]
    if "requeue" not in batch:
        return [
            *lines,
            Finding("requeue", "error", "not tried: the job ended first", "Run the check again"),
        ]
    if batch["requeue"]:
        advice = (
            "A preempted run then stops with code 85 until it is submitted again: ask the administrators to "
            "let users requeue their jobs"
        )
        return [*lines, Finding("requeue", "error", f"refused: {batch['requeue']}", advice)]
    return [*lines, Finding("requeue", "ok", "the job may requeue itself")]
