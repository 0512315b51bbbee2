"""What a cluster answers, as SLURM prints it: two partitions, four nodes of which two have GPUs."""

from jobs.check.known import Known
from tools import slurm

PARTITIONS = """\
PartitionName=low
   AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL
   AllocNodes=ALL Default=YES QoS=N/A
   DefaultTime=01:00:00 DisableRootJobs=NO ExclusiveUser=NO GraceTime=10 Hidden=NO
   MaxNodes=UNLIMITED MaxTime=2-00:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED
   Nodes=n[1-2],g[1-2]
   PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO
   OverTimeLimit=NONE PreemptMode=REQUEUE
   State=UP TotalCPUs=48 TotalNodes=4 SelectTypeParameters=NONE
   DefMemPerCPU=100 MaxMemPerNode=UNLIMITED

PartitionName=high
   AllowGroups=ALL AllowAccounts=vision,speech AllowQos=normal
   AllocNodes=ALL Default=NO QoS=N/A
   DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO
   MaxNodes=1 MaxTime=04:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED
   Nodes=n[1-2]
   PriorityJobFactor=1 PriorityTier=10 RootOnly=NO ReqResv=NO OverSubscribe=NO
   OverTimeLimit=NONE PreemptMode=OFF
   State=UP TotalCPUs=16 TotalNodes=2 SelectTypeParameters=NONE
   DefMemPerNode=UNLIMITED MaxMemPerNode=4000

PartitionName=old
   AllowGroups=ALL DenyAccounts=speech DenyQos=long
   AllocNodes=ALL Default=NO QoS=N/A
   DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO
   MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=2 LLN=NO MaxCPUsPerNode=UNLIMITED
   Nodes=n[1-2]
   PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO
   OverTimeLimit=NONE PreemptMode=CANCEL
   State=DRAIN TotalCPUs=16 TotalNodes=2 SelectTypeParameters=NONE

"""
NODES = """\
n1|mixed|low*|8|8000|(null)|(null)|none
n1|mixed|high|8|8000|(null)|(null)|none
n1|mixed|old|8|8000|(null)|(null)|none
n2|idle|low*|8|8000|(null)|(null)|none
n2|idle|high|8|8000|(null)|(null)|none
n2|idle|old|8|8000|(null)|(null)|none
g1|idle|low*|16|64000|a100,ib|gpu:a100:4(S:0-1),nvme:1|none
g2|drained|low*|16|64000|a100,ib|gpu:a100:4(S:0-1)|broken fan
"""
CONFIG = """\
AccountingStorageEnforce = associations,limits,qos
JobRequeue              = 0
KillWait                = 30 sec
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
"""
ASSOCIATIONS = "vision||normal,long||gpus\ncommon|low|normal|normal|gpus\n"
QOS = "normal||\nlong|7-00:00:00|PartitionTimeLimit\nshort|00:30:00|\n"


def known(**changes: object) -> Known:
    """What SLURM answers there."""
    answers = {
        "partitions": slurm.parse_partitions(PARTITIONS),
        "nodes": slurm.parse_nodes(NODES),
        "config": slurm.parse_config(CONFIG),
        "associations": slurm.parse_associations(ASSOCIATIONS),
        "qos": slurm.parse_qos(QOS),
        "reservations": ["workshop", "maintenance"],
        "pyxis": False,
    }
    return Known(**{**answers, **changes})  # type: ignore[arg-type]
