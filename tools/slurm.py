"""Asking SLURM: jobs, the queue, partitions, nodes and settings, each parsed once, here.

Standard library only and quick to import, because the verdict after a job has less than half a second.
Parsers are pure functions over the text the programs print; `Slurm` runs the programs.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

# name and comment last, a unit separator between them: they may hold bars
QUEUE_FORMAT = "%i|%T|%P|%u|%M|%l|%S|%N|%r|%j\x1f%k"
NODE_FORMAT = "%N|%T|%P|%c|%m|%E"
SILENT = (
    "unable to contact slurm controller",
    "unable to connect to slurm controller",
    "connection refused",
    "connection timed out",
    "socket timed out",
    "slurm backup controller in standby mode",
    "zero bytes were transmitted or received",
    "unable to establish configuration source",
    "could not establish a configuration source",
)
# What these hold would change what the programs print.
REFORMATTING = ("SQUEUE_", "SINFO_", "SCONTROL_", "SLURM_TIME_FORMAT", "SLURM_BITSTR_LEN", "SLURM_CLUSTERS")
ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)


# SLURM names what it is doing to a running job in place of RUNNING: SIGNALING while a node has not answered.
RUNNING = frozenset({"RUNNING", "CONFIGURING", "RESIZING", "SIGNALING", "STOPPED", "SUSPENDED"})


class SlurmUnavailable(Exception):
    """SLURM gave no answer: a program is missing, the controller is silent, or the call took too long."""


class SlurmRefused(Exception):
    """SLURM answered, and said no; the message is its own."""


@dataclass(frozen=True)
class JobState:
    """One job (or one member of an array) as `scontrol show job` tells it; times are local and naive."""

    job_id: str  # "17", or "17_3" for a member of an array: what scontrol and scancel take
    state: str  # RUNNING, PENDING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, …
    reason: str  # "None" when there is none
    partition: str
    restarts: int
    exit_code: int
    end_time: datetime | None
    preempt_time: datetime | None
    nodes: tuple[str, ...]  # () while it has none
    batch_host: str | None
    excluded: tuple[str, ...]

    @property
    def ended(self) -> bool:
        """Whether it will not run again by itself."""
        return self.state in ENDED

    @property
    def running(self) -> bool:
        """Whether it has its nodes, and is not about to leave them."""
        return self.state in RUNNING


@dataclass(frozen=True)
class QueuedJob:
    """One line of squeue: a job that waits, runs or is completing."""

    job_id: str  # "17" or "17_3"
    state: str
    partition: str
    user: str
    elapsed: str  # as squeue writes it: [days-]hours:minutes:seconds
    time_limit: str
    start_time: datetime | None  # the expected one while it waits
    nodes: tuple[str, ...]
    reason: str
    name: str
    comment: str  # empty where there is none


@dataclass(frozen=True)
class Partition:
    """One partition."""

    name: str
    default: bool
    nodes: tuple[str, ...]
    grace_seconds: int


@dataclass(frozen=True)
class Node:
    """One node as sinfo sees it."""

    name: str
    state: str  # idle, mixed, allocated, completing, down, …; without sinfo's mark
    responding: bool
    partitions: tuple[str, ...]
    cpus: int
    memory_mb: int
    reason: str


class Slurm:
    """The cluster that the environment names, or the one whose configuration file is given.

    Every call raises SlurmUnavailable when there is no answer within `timeout` seconds.
    """

    def __init__(self, conf: Path | None = None, *, timeout: float = 10.0) -> None:
        self.timeout = timeout
        self._environment = plain_environment(os.environ)
        if conf is not None:
            self._environment["SLURM_CONF"] = str(conf)

    def job(self, job_id: str) -> JobState | None:
        """What SLURM knows of one job or array member; None when it knows nothing of it (any more)."""
        found = parse_jobs(self._ask_of_jobs("scontrol", "show", "job", job_id))
        exact = [state for state in found if state.job_id == job_id]
        return next(iter(exact or found), None)

    def queue(self, *, user: str | None = None, job_ids: Iterable[str] | None = None) -> list[QueuedJob]:
        """The jobs that wait, run or complete; of one user, or with these ids (array members apart)."""
        wanted = ["squeue", "--noheader", "--array", f"--format={QUEUE_FORMAT}"]
        if user is not None:
            wanted.append(f"--user={user}")
        if job_ids is not None:
            ids = list(job_ids)
            if not ids:
                return []
            wanted.append(f"--jobs={','.join(ids)}")
        return parse_queue(self._ask_of_jobs(*wanted))

    def partitions(self) -> list[Partition]:
        """All partitions that this user may see."""
        return parse_partitions(self._ask("scontrol", "show", "partition"))

    def nodes(self) -> list[Node]:
        """All nodes, as sinfo sorts them: n2 before n10."""
        return parse_nodes(self._ask("sinfo", "--Node", "--noheader", f"--format={NODE_FORMAT}"))

    def config(self) -> dict[str, str]:
        """The cluster's settings as `scontrol show config` prints them: KillWait -> "30 sec"."""
        return parse_config(self._ask("scontrol", "show", "config"))

    def kill_wait(self) -> int:
        """Seconds between SIGTERM and SIGKILL when a job's time is over or it is cancelled."""
        return int(self.config()["KillWait"].split()[0])  # "30 sec"

    def requeue(self, job_id: str) -> None:
        """Ask for the job to run again; raises SlurmRefused, e.g. when it was submitted without --requeue."""
        self._ask("scontrol", "requeue", job_id)

    def release(self, job_id: str) -> None:
        """Let a requeued job start now instead of about two minutes later (Reason=BeginTime)."""
        self._ask("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def exclude(self, job_id: str, nodes: Sequence[str]) -> None:
        """Keep a pending job away from exactly these nodes; SLURM refuses it for a running one."""
        self._ask("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}")

    def cancel(self, job_ids: Iterable[str]) -> None:
        """scancel; jobs that ended already are no error."""
        ids = list(job_ids)
        if ids:
            self._ask("scancel", "--quiet", *ids)

    def submit(self, *arguments: str) -> str:
        """sbatch with these arguments; returns the job's id."""
        return self._ask("sbatch", "--parsable", *arguments).strip().split(";")[0]

    def _ask_of_jobs(self, *command: str) -> str:
        """`_ask`; nothing where SLURM knows no such job (any more)."""
        try:
            return self._ask(*command)
        except SlurmRefused as refusal:
            if "invalid job id" in str(refusal).lower():
                return ""
            raise

    def _ask(self, *command: str) -> str:
        conf = self._environment.get("SLURM_CONF")
        if conf and not os.path.exists(conf):  # SLURM's programs would wait a minute for it
            raise SlurmUnavailable(f"SLURM_CONF names {conf}, which does not exist")
        try:
            done = subprocess.run(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout,
            )
        except FileNotFoundError:
            raise SlurmUnavailable(f"no {command[0]} on the PATH") from None
        except subprocess.TimeoutExpired:
            raise SlurmUnavailable(f"{command[0]} gave no answer in {self.timeout:g} s") from None
        if done.returncode == 0:
            return done.stdout
        message = (done.stderr or done.stdout).strip() or f"{command[0]} ended with {done.returncode}"
        if any(sign in message.lower() for sign in SILENT):
            raise SlurmUnavailable(message)
        raise SlurmRefused(message)


def plain_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that change what SLURM's programs print."""
    kept = {name: value for name, value in environment.items() if not name.startswith(REFORMATTING)}
    return {**kept, "SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}


def parse_jobs(text: str) -> list[JobState]:
    """The jobs in the output of `scontrol show job` (many lines a job, an empty line between)."""
    return [_job(fields) for fields in _records(text, "JobId")]


def parse_queue(text: str) -> list[QueuedJob]:
    """The jobs in squeue's output in QUEUE_FORMAT."""
    jobs = []
    for line in text.splitlines():
        parts = line.split("|", 9)
        if len(parts) == 10:
            job_id, state, partition, user, elapsed, limit, start, nodes, reason, rest = parts
            name, _, comment = rest.partition("\x1f")
            comment = "" if comment == "(null)" else comment
            begin, named = parse_time(start), expand_nodes(nodes)
            jobs.append(
                QueuedJob(job_id, state, partition, user, elapsed, limit, begin, named, reason, name, comment)
            )
    return jobs


def parse_partitions(text: str) -> list[Partition]:
    """The partitions in the output of `scontrol show partition`."""
    return [
        Partition(
            name=fields["PartitionName"],
            default=fields.get("Default") == "YES",
            nodes=expand_nodes(fields.get("Nodes", "")),
            grace_seconds=int(fields.get("GraceTime", "0")),
        )
        for fields in _records(text, "PartitionName")
    ]


def parse_nodes(text: str) -> list[Node]:
    """The nodes in sinfo's output in NODE_FORMAT: one line for each node in each partition."""
    nodes: dict[str, Node] = {}
    for line in text.splitlines():
        parts = line.split("|", 5)
        if len(parts) != 6:
            continue
        name, state, partition, cpus, memory, reason = parts
        seen = nodes[name].partitions if name in nodes else ()
        nodes[name] = Node(
            name=name,
            state=state.rstrip("*~#!%$@^-+"),
            responding="*" not in state,
            partitions=(*seen, partition.rstrip("*")),
            cpus=int(cpus),
            memory_mb=int(memory),
            reason="" if reason == "none" else reason,
        )
    return list(nodes.values())


def parse_config(text: str) -> dict[str, str]:
    """The `key = value` lines of `scontrol show config`."""
    lines = (line.partition(" = ") for line in text.splitlines())
    return {key.strip(): value.strip() for key, bar, value in lines if bar}


def parse_time(text: str) -> datetime | None:
    """A time as SLURM writes it (local, "2026-11-21T02:23:32"); None for None, Unknown and N/A."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def expand_nodes(text: str) -> tuple[str, ...]:
    """The names in a host list: "n[1-3,07],gpu2" -> n1 n2 n3 n07 gpu2; several brackets multiply."""
    if text in ("", "(null)", "None", "None assigned", "N/A"):
        return ()
    parts = re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text)
    return tuple(name for part in parts for name in _expand(part))


def _expand(part: str) -> Iterator[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        yield head
        return
    inner, _, tail = rest.partition("]")
    for span in inner.split(","):
        first, dash, last = span.partition("-")
        numbers = range(int(first), int(last) + 1) if dash else [int(first)]
        for number in numbers:
            for ending in _expand(tail):
                yield f"{head}{number:0{len(first)}d}{ending}"


# A value that may hold blanks takes the rest of its line.
FIELD = re.compile(
    r"(?:^|(?<=\s))(?:(JobName|Command|WorkDir|Comment|AdminComment|SystemComment|StdErr|StdIn|StdOut)=(.*)"
    r"|([^\s=]+)=(\S*))",
    re.MULTILINE,
)


def _records(text: str, first_key: str) -> Iterator[dict[str, str]]:
    """The `key=value` fields of each record; of a key that comes again the first."""
    for record in re.split(rf"^(?={first_key}=)", text, flags=re.MULTILINE)[1:]:
        fields: dict[str, str] = {}
        for long_key, line, key, word in FIELD.findall(record):
            fields.setdefault(long_key or key, line or word)
        yield fields


def _job(fields: Mapping[str, str]) -> JobState:
    job_id = fields["JobId"]
    if "ArrayTaskId" in fields and "ArrayJobId" in fields:
        job_id = f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}"
    host = fields.get("BatchHost")
    return JobState(
        job_id=job_id,
        state=fields.get("JobState", "UNKNOWN"),
        reason=fields.get("Reason", "None"),
        partition=fields.get("Partition", ""),
        restarts=int(fields.get("Restarts", "0")),
        exit_code=int(fields.get("ExitCode", "0:0").partition(":")[0]),
        end_time=parse_time(fields.get("EndTime", "")),
        preempt_time=parse_time(fields.get("PreemptTime", "")),
        nodes=expand_nodes(fields.get("NodeList", "")),
        batch_host=None if host in (None, "(null)") else host,
        excluded=expand_nodes(fields.get("ExcNodeList", "")),
    )
