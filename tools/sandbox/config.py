"""The configuration of a throwaway SLURM cluster on one machine: programs, address, ports, slurm.conf."""

from __future__ import annotations

import json
import os
import pwd
import random
import re
import shutil
import socket
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from clipcluster.errors import UserError
from tools.slurm import Slurm

DAEMONS = ("slurmctld", "slurmd")
CLIENTS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
ADMIN_FOLDERS = ("/usr/sbin", "/sbin", "/usr/local/sbin")  # not on every user's PATH
PORTS = range(20000, 32000)  # below the range from which systems give outgoing connections theirs
SOCKET_ROOM = 107 - len("/n999/n999_4294967295.4294967295")  # a Unix socket's path ends at 107 characters
STATE_FILE = "sandbox.json"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Sandbox:
    """A throwaway cluster: its folder, how it is reached, what it claims to be. Times in seconds."""

    folder: Path
    cluster: str  # its SLURM ClusterName, unlike any other's: by it its tasks are known
    nodes: tuple[str, ...]
    cpus: int  # of each node, whatever the machine has
    grace_seconds: int
    kill_wait_seconds: int
    user_signal: bool  # whether a preemption sends the user's signal (USR2) instead of TERM alone
    address: str  # the loopback address everything listens on
    control_port: int
    node_ports: tuple[int, ...]
    spool: Path
    own_host_name: bool  # whether the daemons run under the host name "localhost", in a namespace

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
    def shell_line(self) -> str:
        """The line that points a shell at this cluster."""
        return f"export SLURM_CONF={self.conf}"

    @property
    def slurm(self) -> Slurm:
        """For asking this cluster."""
        return Slurm(self.conf)

    def write(self) -> None:
        """Remember it in its folder, so that a later call finds it whatever happens to this process."""
        facts = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        aside = self.folder / f"{STATE_FILE}.new"
        aside.write_text(json.dumps(facts, indent=1) + "\n")
        aside.replace(self.folder / STATE_FILE)

    @staticmethod
    def read(folder: Path) -> Sandbox | None:
        """The sandbox of this folder, None if it holds none."""
        try:
            facts = json.loads((folder / STATE_FILE).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        found = Sandbox(**facts)
        return replace(
            found,
            folder=Path(found.folder),
            spool=Path(found.spool),
            nodes=tuple(found.nodes),
            node_ports=tuple(found.node_ports),
        )


def find_programs() -> dict[str, str]:
    """The path of every SLURM program; raises UserError naming what is missing and how it is installed."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *ADMIN_FOLDERS))
    found = {name: shutil.which(name, path=path) for name in (*DAEMONS, *CLIENTS)}
    missing = [name for name, place in found.items() if place is None]
    if missing:
        raise UserError(
            f"the sandbox needs SLURM's own programs, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not on this machine "
            f"(looked on the PATH and in {', '.join(ADMIN_FOLDERS)}). "
            "On Debian and Ubuntu: apt-get install --no-install-recommends slurm-wlm. "
            "Nothing of an installed SLURM is configured or started by that or by the sandbox."
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


def free_ports(count: int) -> list[int]:
    """`count` ports in a row that nobody listens on now; raises UserError if there are none."""
    for _ in range(200):
        first = random.randrange(PORTS.start, PORTS.stop - count)
        if all(_is_free(port) for port in range(first, first + count)):
            return list(range(first, first + count))
    raise UserError(f"no {count} free ports in a row between {PORTS.start} and {PORTS.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def plan(
    folder: Path,
    *,
    nodes: int,
    cpus: int,
    grace_seconds: int,
    kill_wait_seconds: int,
    user_signal: bool,
) -> Sandbox:
    """Choose names, address and ports for a sandbox in this folder; writes nothing but a spool folder."""
    if not 1 <= nodes <= 64:
        raise UserError(f"a sandbox has 1 to 64 nodes, not {nodes}")
    for what, value, least in (
        ("CPUs of a node", cpus, 1),
        ("grace time in seconds", grace_seconds, 0),
        ("kill wait in seconds", kill_wait_seconds, 1),
    ):
        if value < least:
            raise UserError(f"{what}: {value} was given, the least is {least}")
    if not re.fullmatch(r"[\w./+-]+", str(folder), re.ASCII):
        raise UserError(
            f"the sandbox folder {folder} has characters that SLURM's files cannot hold; "
            "give a folder of plain letters, digits and . _ - +"
        )
    control_port, *node_ports = free_ports(nodes + 1)
    spool = folder / "spool"
    if len(str(spool)) > SOCKET_ROOM:
        spool = Path(tempfile.mkdtemp(prefix="clipcluster-sandbox-", dir="/tmp"))
    return Sandbox(
        folder=folder,
        cluster=f"sandbox_{os.urandom(6).hex()}",
        nodes=tuple(f"n{number}" for number in range(1, nodes + 1)),
        cpus=cpus,
        grace_seconds=grace_seconds,
        kill_wait_seconds=kill_wait_seconds,
        user_signal=user_signal,
        address=LOOPBACK,
        control_port=control_port,
        node_ports=tuple(node_ports),
        spool=spool,
        own_host_name=not listens_on_loopback(),
    )


def slurm_conf(sandbox: Sandbox) -> str:
    """The text of slurm.conf."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    folder, first, last = sandbox.folder, sandbox.node_ports[0], sandbox.node_ports[-1]
    count = len(sandbox.nodes)
    names = f"n[1-{count}]" if count > 1 else "n1"
    ports = f"[{first}-{last}]" if count > 1 else str(first)
    signal = "SlurmctldParameters=preempt_send_user_signal\n" if sandbox.user_signal else ""
    mail = shutil.which("true") or "/bin/true"
    return f"""\
ClusterName={sandbox.cluster}
SlurmctldHost=localhost({sandbox.address})
SlurmctldPort={sandbox.control_port}
SlurmUser={user}
SlurmdUser={user}
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
MailProg={mail}

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
MaxArraySize=1001

NodeName={names} NodeHostname=localhost NodeAddr={sandbox.address} Port={ports} \
CPUs={sandbox.cpus} RealMemory=8000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=1 \
PreemptMode=REQUEUE GraceTime={sandbox.grace_seconds}
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


def launch_line(sandbox: Sandbox, *command: str) -> list[str]:
    """The command as it must be started: in a namespace where the machine's name needs one."""
    if not sandbox.own_host_name:
        return list(command)
    return [sys.executable, str(Path(__file__).with_name("hostname.py")), *command]
