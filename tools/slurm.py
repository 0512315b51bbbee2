"""Asking SLURM: jobs, the queue, partitions, nodes and settings, each parsed once, here.

Standard library only and quick to import, because the verdict after a job has less than half a second.
Parsers are pure functions over the text the programs print; `Slurm` runs the programs.
"""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

Said = TypeVar("Said")
T = TypeVar("T")

# name and comment last, a unit separator between them: they may hold bars
QUEUE_FORMAT = "%i|%T|%P|%u|%M|%l|%S|%N|%r|%j\x1f%k"
NODE_FORMAT = "%N|%T|%P|%c|%m|%f|%G|%E"
ASSOCIATION_FORMAT = "Account,Partition,QOS,DefaultQOS,Cluster"
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


LEAVING = ENDED | {"COMPLETING"}  # of a job that has left its nodes, or is about to
# SLURM names what it is doing to a running job in place of RUNNING: SIGNALING while a node has not answered.
RUNNING = frozenset({"RUNNING", "CONFIGURING", "RESIZING", "SIGNALING", "STOPPED", "SUSPENDED"})
# … and to a waiting one in place of PENDING: SPECIAL_EXIT where an administrator requeued and holds it.
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"})


class SlurmUnavailable(Exception):
    """SLURM gave no answer: a program is missing, the controller is silent, or the call took too long.

    Or none that can be read.
    """


class SlurmMissing(SlurmUnavailable):
    """There is no SLURM here to ask: no program of it, or no configuration."""


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
    def leaving(self) -> bool:
        """Whether it has left its nodes, or is about to; not so by a word that is not known here."""
        return not LEAVING.isdisjoint(re.split("[+,]", self.state))

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
    state: str = "UP"  # DOWN: jobs wait; DRAIN and INACTIVE: none is accepted
    preempt_mode: str = ""  # of its jobs, where they are preempted; empty: the cluster's
    max_seconds: int | None = None  # a job's time limit at most; None: no bound
    min_nodes: int = 0  # of a job
    max_nodes: int | None = None
    max_memory_mb: int | None = None  # of a job on each node
    accounts: tuple[str, ...] | None = None  # that alone may use it; None: all
    denied_accounts: tuple[str, ...] = ()
    qos: tuple[str, ...] | None = None  # that alone may be used in it; None: all
    denied_qos: tuple[str, ...] = ()
    exclusive: bool = False  # whether a job gets whole nodes


@dataclass(frozen=True)
class Gpus:
    """GPUs of one type in a node; the type is empty where the site names none."""

    type: str
    count: int


@dataclass(frozen=True)
class Node:
    """One node as sinfo sees it."""

    name: str
    state: str  # idle, mixed, allocated, completing, down, …; without sinfo's mark
    responding: bool
    partitions: tuple[str, ...]
    cpus: int
    memory_mb: int
    features: tuple[str, ...]
    gpus: tuple[Gpus, ...]
    reason: str

    @property
    def gpu_count(self) -> int:
        """All its GPUs."""
        return sum(each.count for each in self.gpus)


@dataclass(frozen=True)
class Association:
    """What a user may use, as the accounting database has it."""

    account: str
    partition: str  # empty: any
    qos: tuple[str, ...]
    default_qos: str = ""  # of jobs that ask for none
    cluster: str = ""  # one database may serve several


@dataclass(frozen=True)
class Qos:
    """A quality of service: the seconds that a job in it may take (None: no bound), and its flags."""

    max_seconds: int | None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """When and where a job would start, as `sbatch --test-only` estimates it."""

    time: datetime
    nodes: tuple[str, ...]
    partition: str


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
        found = _read(parse_jobs, self._ask_of_jobs("scontrol", "show", "job", job_id))
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
        return _read(parse_queue, self._ask_of_jobs(*wanted))

    def partitions(self) -> list[Partition]:
        """All partitions, hidden ones included."""
        return _read(parse_partitions, self._ask("scontrol", "--all", "show", "partition"))

    def nodes(self) -> list[Node]:
        """All nodes, as sinfo sorts them: n2 before n10."""
        wanted = ("sinfo", "--all", "--Node", "--noheader", f"--format={NODE_FORMAT}")
        return _read(parse_nodes, self._ask(*wanted))

    def config(self) -> dict[str, str]:
        """The cluster's settings as `scontrol show config` prints them: KillWait -> "30 sec"."""
        return parse_config(self._ask("scontrol", "show", "config"))

    def kill_wait(self) -> int:
        """Seconds between SIGTERM and SIGKILL when a job's time is over or it is cancelled."""
        return _read(kill_wait_of, self.config())

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

    def associations(self) -> list[Association]:
        """What this user may use, where there is an accounting database; SlurmRefused where there is none."""
        who, columns = f"user={_user_name()}", f"format={ASSOCIATION_FORMAT}"
        return parse_associations(self._ask("sacctmgr", "-nP", "show", "associations", who, columns))

    def qos(self) -> dict[str, Qos]:
        """Each quality of service by its name."""
        return parse_qos(self._ask("sacctmgr", "-nP", "show", "qos", "format=Name,MaxWall,Flags"))

    def reservations(self) -> list[str]:
        """The names of the reservations that this user may see."""
        text = self._ask("scontrol", "show", "reservation")
        return [fields["ReservationName"] for fields in _records(text, "ReservationName")]

    def usage(self, program: str) -> str:
        """What a program of SLURM prints of its options, those of the site's plugins included."""
        return self._ask(program, "--help")

    def expected_start(self, *arguments: str) -> Start | None:
        """When a job that sbatch is given with these arguments would start; None where SLURM cannot say.

        Nothing is submitted. Raises SlurmRefused for a job that would be refused.
        """
        return _read(parse_start, self._run("sbatch", "--test-only", *arguments, "--wrap=true").stderr)

    def _ask_of_jobs(self, *command: str) -> str:
        """`_ask`; nothing where SLURM knows no such job (any more)."""
        try:
            return self._ask(*command)
        except SlurmRefused as refusal:
            if "invalid job id" in str(refusal).lower():
                return ""
            raise

    def _ask(self, *command: str) -> str:
        return self._run(*command).stdout

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        conf = self._environment.get("SLURM_CONF")
        if conf and not os.path.exists(conf):  # SLURM's programs would wait a minute for it
            raise SlurmMissing(f"SLURM_CONF names {conf}, which does not exist")
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
            raise SlurmMissing(f"no {command[0]} on the PATH") from None
        except subprocess.TimeoutExpired:
            raise SlurmUnavailable(f"{command[0]} gave no answer in {self.timeout:g} s") from None
        if done.returncode == 0:
            return done
        message = (done.stderr or done.stdout).strip() or f"{command[0]} ended with {done.returncode}"
        if any(sign in message.lower() for sign in SILENT):
            raise SlurmUnavailable(message)
        raise SlurmRefused(message)


def _read(parse: Callable[[Said], T], said: Said) -> T:
    """What was said, parsed; words that no version known here prints are no answer."""
    try:
        return parse(said)
    except (ValueError, KeyError, IndexError) as error:
        raise SlurmUnavailable(f"SLURM's answer cannot be read: {error}") from None


def _user_name() -> str:
    """By number: the variables that name a user may name another one."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise SlurmUnavailable(f"user {os.getuid()} has no name on this machine") from None


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
    return [_partition(fields) for fields in _records(text, "PartitionName")]


def _partition(fields: Mapping[str, str]) -> Partition:
    return Partition(
        name=fields["PartitionName"],
        default=fields.get("Default") == "YES",
        nodes=expand_nodes(fields.get("Nodes", "")),
        grace_seconds=_number(fields.get("GraceTime")) or 0,
        state=fields.get("State", "UP"),
        preempt_mode=fields.get("PreemptMode", ""),
        max_seconds=parse_span(fields.get("MaxTime", "")),
        min_nodes=_number(fields.get("MinNodes")) or 0,
        max_nodes=_number(fields.get("MaxNodes")),
        max_memory_mb=_megabytes(fields.get("MaxMemPerNode")),
        accounts=_allowed(fields.get("AllowAccounts")),
        denied_accounts=_allowed(fields.get("DenyAccounts")) or (),
        qos=_allowed(fields.get("AllowQos")),
        denied_qos=_allowed(fields.get("DenyQos")) or (),
        exclusive=fields.get("OverSubscribe") == "EXCLUSIVE",
    )


def _number(text: str | None) -> int | None:
    """A limit; None for UNLIMITED and what is not there."""
    return int(text) if text and text.isdecimal() else None


def _megabytes(text: str | None) -> int | None:
    """A limit in megabytes, 4000 or with a unit, 4G or 4.00T; None for UNLIMITED and what is not there."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]?)", text or "")
    return int(float(match[1]) * 1024 ** ("KMGTP".find(match[2] or "M") - 1)) if match else None


def _allowed(text: str | None) -> tuple[str, ...] | None:
    """The names in a list; None for ALL and what is not there."""
    return None if text in (None, "", "ALL", "N/A", "(null)") else tuple(str(text).split(","))


def parse_span(text: str) -> int | None:
    """Seconds of a span as SLURM writes it, [days-]hours:minutes:seconds; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+)(?::(\d+))?", text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    if not (match[1] or match[4]):
        hours, minutes, seconds = 0, hours, minutes
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def parse_associations(text: str) -> list[Association]:
    """The lines of `sacctmgr -nP show associations` in ASSOCIATION_FORMAT."""
    lines = (line.split("|") for line in text.splitlines())
    return [
        Association(account, partition, tuple(filter(None, qos.split(","))), default, cluster)
        for account, partition, qos, default, cluster in (parts for parts in lines if len(parts) == 5)
    ]


def parse_qos(text: str) -> dict[str, Qos]:
    """The lines of `sacctmgr -nP show qos format=Name,MaxWall,Flags`."""
    lines = (line.split("|") for line in text.splitlines())
    return {
        name: Qos(parse_span(longest), tuple(filter(None, flags.split(","))))
        for name, longest, flags in (parts for parts in lines if len(parts) == 3)
    }


def parse_start(text: str) -> Start | None:
    """What `sbatch --test-only` says; None where it names no time."""
    found = re.search(r"to start at (\S+) using .* on nodes (\S+)(?: in partition (\S+))?", text)
    time = parse_time(found[1]) if found else None
    return Start(time, expand_nodes(found[2]), found[3] or "") if found and time else None


def parse_nodes(text: str) -> list[Node]:
    """The nodes in sinfo's output in NODE_FORMAT: one line for each node in each partition."""
    nodes: dict[str, Node] = {}
    for line in text.splitlines():
        parts = line.split("|", 7)
        if len(parts) != 8:
            continue
        name, state, partition, cpus, memory, features, gres, reason = parts
        seen = nodes[name].partitions if name in nodes else ()
        nodes[name] = Node(
            name=name,
            state=state.rstrip("*~#!%$@^-+"),
            responding="*" not in state,
            partitions=(*seen, partition.rstrip("*")),
            cpus=int(cpus.rstrip("+")),
            memory_mb=int(memory.rstrip("+")),
            features=() if features == "(null)" else tuple(features.split(",")),
            gpus=parse_gpus(gres),
            reason="" if reason == "none" else reason,
        )
    return list(nodes.values())


def parse_gpus(gres: str) -> tuple[Gpus, ...]:
    """The GPUs in a list of generic resources: "gpu:a100:4(S:0-1),nvme:1" -> four of type a100."""
    return tuple(
        Gpus(kind, int(count))
        for kind, count in re.findall(r"(?:^|,)gpu(?::([^:,()]+))?(?::no_consume)?:(\d+)", gres)
    )


def parse_config(text: str) -> dict[str, str]:
    """The `key = value` lines of `scontrol show config`."""
    lines = (line.partition(" = ") for line in text.splitlines())
    return {key.strip(): value.strip() for key, bar, value in lines if bar}


def kill_wait_of(config: Mapping[str, str]) -> int:
    """Seconds between SIGTERM and SIGKILL by the cluster's settings, "30 sec". ValueError for other words."""
    return int(config.get("KillWait", "").partition(" ")[0])


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
    r"(?:^|(?<=\s))(?:(JobName|Command|SubmitLine|WorkDir|Comment|AdminComment|SystemComment|Extra"
    r"|StdErr|StdIn|StdOut)=(.*)|([^\s=]+)=(\S*))",
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
