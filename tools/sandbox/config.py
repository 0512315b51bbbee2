"""The configuration of a throwaway SLURM cluster on one machine: programs, address, ports, slurm.conf."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from clipcluster.errors import UserError
from tools.slurm import Slurm

DAEMONS = ("slurmctld", "slurmd")
CLIENTS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
ADMIN_FOLDERS = ("/usr/sbin", "/sbin", "/usr/local/sbin")  # not on every user's PATH
PORTS = range(20000, 32000)  # below the range from which systems give outgoing connections theirs
# After the daemons' ports: what another cluster sends to an srun that has ended reaches none of this one.
SRUN_PORTS = 100
SOCKET_ROOM = 107 - len("/n999/n999_4294967295.4294967295")  # a Unix socket's path ends at 107 characters
STATE_FILE = "sandbox.json"
LOOPBACK = "127.0.0.1"
MOST_JOBS = 50_000_000  # SLURM numbers jobs up to 67,043,328


@dataclass(frozen=True)
class Sandbox:
    """A throwaway cluster: its folder, how it is reached, what it claims to be. Times in seconds."""

    folder: Path
    node_count: int
    cpus: int  # of each node, whatever the machine has
    grace_seconds: int
    kill_wait_seconds: int
    user_signal: bool  # whether a preemption sends the signal of the job's --signal instead of TERM
    cluster: str  # its SLURM ClusterName, unlike any other's: by it its tasks are known
    port: int  # slurmctld's; the nodes' are the next ones
    spool: Path
    own_host_name: bool  # whether the daemons run under the host name "localhost", in a namespace
    first_job: int = 1  # the number of its first job

    @property
    def nodes(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(f"n{number}" for number in range(1, self.node_count + 1))

    @property
    def conf(self) -> Path:
        """The slurm.conf; SLURM_CONF points every SLURM program at this cluster."""
        return self.folder / "slurm.conf"

    @property
    def logs(self) -> Path:
        """slurmctld.log and one NODE.log for each node."""
        return self.folder / "log"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to speak to this cluster."""
        return {"SLURM_CONF": str(self.conf)}

    @property
    def slurm(self) -> Slurm:
        """For asking this cluster."""
        return Slurm(self.conf)

    def write(self) -> None:
        """Remember it in its folder, so that a later call finds it whatever happens to this process."""
        aside = self.folder / f"{STATE_FILE}.new"
        aside.write_text(json.dumps(asdict(self), indent=1, default=str) + "\n")
        aside.replace(self.folder / STATE_FILE)

    @staticmethod
    def read(folder: Path) -> Sandbox | None:
        """The sandbox of this folder, None if it holds none."""
        try:
            facts = json.loads((folder / STATE_FILE).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Sandbox(**{**facts, "folder": Path(facts["folder"]), "spool": Path(facts["spool"])})


def find_programs() -> dict[str, str]:
    """The path of every SLURM program; raises UserError naming what is missing and how it is installed."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *ADMIN_FOLDERS))
    found = {name: shutil.which(name, path=path) for name in (*DAEMONS, *CLIENTS)}
    missing = [name for name, place in found.items() if place is None]
    if missing:
        raise UserError(
            f"the sandbox needs SLURM's programs; not on the PATH nor in {', '.join(ADMIN_FOLDERS)}: "
            f"{', '.join(missing)}. On Debian and Ubuntu: apt-get install --no-install-recommends slurm-wlm"
        )
    return {name: place for name, place in found.items() if place is not None}


def listens_on_loopback() -> bool:
    """Whether SLURM, told NoInAddrAny, would listen on LOOPBACK.

    It binds to whatever the machine's own name resolves to. 127.0.1.1 would not do either: srun would listen
    there, and the nodes answer to the address its connection came from, which is 127.0.0.1.
    """
    try:
        return socket.gethostbyname(socket.gethostname()) == LOOPBACK
    except OSError:
        return False


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on now; raises UserError if there are none."""
    for _ in range(200):
        first = random.randrange(PORTS.start, PORTS.stop - count - SRUN_PORTS)
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise UserError(f"no {count} free ports in a row between {PORTS.start} and {PORTS.stop}")


def first_job() -> int:
    """The number of a new cluster's first job, by the clock: run folders may name jobs of older clusters."""
    return 1 + int(time.time()) % MOST_JOBS


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def spool_of(folder: Path) -> Path:
    """Where the daemons' sockets lie: in the folder, or in /tmp where its path is too long for them."""
    spool = folder / "spool"
    if len(str(spool)) <= SOCKET_ROOM:
        return spool
    return Path(tempfile.mkdtemp(prefix="clipcluster-sandbox-", dir="/tmp"))


def slurm_conf(sandbox: Sandbox) -> str:
    """The text of slurm.conf."""
    folder, port, count = sandbox.folder, sandbox.port, sandbox.node_count
    signal = "SlurmctldParameters=preempt_send_user_signal" if sandbox.user_signal else ""
    return f"""\
ClusterName={sandbox.cluster}
SlurmctldHost=localhost({LOOPBACK})
SlurmctldPort={port}
SrunPortRange={port + count + 1}-{port + count + SRUN_PORTS}
SlurmUser={os.getuid()}
SlurmdUser={os.getuid()}
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPidFile={folder}/pid/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdPidFile={folder}/pid/%n.pid
SlurmdLogFile={folder}/log/%n.log
SlurmdSpoolDir={sandbox.spool}/%n
StateSaveLocation={folder}/state
PlugStackConfig={folder}/plugstack.conf
MailProg=/bin/true

SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none

PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={sandbox.kill_wait_seconds}
{signal}
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=1
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=10
InactiveLimit=0
ReturnToService=2
MinJobAge=3600
MaxJobCount=20000
FirstJobId={sandbox.first_job}
MaxArraySize=1001

NodeName=n[1-{count}] NodeHostname=localhost NodeAddr={LOOPBACK} Port=[{port + 1}-{port + count}] \
CPUs={sandbox.cpus} RealMemory=8000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=1 \
PreemptMode=REQUEUE GraceTime={sandbox.grace_seconds}
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""
