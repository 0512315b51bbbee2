"""SLURM's answers, as version 22.05 printed them, read by the pure parsers."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.errors import UserError
from tools import slurm
from tools.sandbox.preempt import job_of

RUNNING = """\
JobId=1 JobName=a | b JobState=FAKE
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901759 Nice=0 Account=(null) QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:01 TimeLimit=01:00:00 TimeMin=N/A
   SubmitTime=2026-11-21T02:48:12 EligibleTime=2026-11-21T02:48:12
   AccrueTime=2026-11-21T02:48:12
   StartTime=2026-11-21T02:48:12 EndTime=2026-11-21T03:48:12 Deadline=N/A
   PreemptEligibleTime=2026-11-21T02:48:12 PreemptTime=None
   SuspendTime=None SecsPreSuspend=0 LastSchedEval=2026-11-21T02:48:12 Scheduler=Backfill
   Partition=low AllocNode:Sid=vm:2526
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=n[1-2]
   BatchHost=n1
   NumNodes=2 NumCPUs=2 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   TRES=cpu=2,mem=200M,node=2,billing=2
   Socks/Node=* NtasksPerN:B:S:C=0:0:*:* CoreSpec=*
   MinCPUsNode=1 MinMemoryCPU=100M MinTmpDiskNode=0
   Features=(null) DelayBoot=00:00:00
   OverSubscribe=OK Contiguous=0 Licenses=(null) Network=(null)
   Command=(null)
   WorkDir=/home/me/my runs
   Comment=Restarts=7 x
   StdErr=/dev/null
   StdIn=/dev/null
   StdOut=/dev/null
   Power=
   

"""
PENDING_ARRAY = """\
JobId=2 ArrayJobId=2 ArrayTaskId=1-2 JobName=wrap
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901758 Nice=0 Account=(null) QOS=(null)
   JobState=PENDING Reason=Resources Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   SubmitTime=2026-11-21T02:48:12 EligibleTime=2026-11-21T02:48:12
   StartTime=2026-11-21T04:48:00 EndTime=2026-11-21T05:48:00 Deadline=N/A
   Partition=low AllocNode:Sid=vm:2526
   ReqNodeList=(null) ExcNodeList=n[1,3]
   NodeList= SchedNodeList=n[1-2]
   NumNodes=2-2 NumCPUs=8 NumTasks=8 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   Command=/home/me/job.sh
   WorkDir=/home/me

"""
MEMBER = """\
JobId=5 ArrayJobId=3 ArrayTaskId=2 JobName=job.sh
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   SubmitTime=2026-11-21T02:42:37 EligibleTime=2026-11-21T02:42:38
   StartTime=2026-11-21T02:42:38 EndTime=2026-11-21T03:42:38 Deadline=N/A
   PreemptEligibleTime=2026-11-21T02:42:38 PreemptTime=2026-11-21T02:42:40
   Partition=low AllocNode:Sid=vm:2526
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=n3
   BatchHost=n3
   Command=/tmp/job.sh
   WorkDir=/tmp

"""
QUEUE = """\
2_1|PENDING|low|root|0:00|1:00:00|2026-11-21T04:48:00||Resources|wrap
2_2|PENDING|low|root|0:00|1:00:00|N/A||BeginTime|wrap
1|RUNNING|low|root|0:01|1:00:00|2026-11-21T02:48:12|n[1-2]|None|a | b JobState=FAKE
"""
NODES = """\
n1|mixed|low*|4|8000|(null)|(null)|none
n1|mixed|high|4|8000|(null)|(null)|none
n2|down*|low*|4|8000|a100,ib|gpu:a100:4(S:0,1),nvme:1|Not responding
n2|down*|high|4|8000|a100,ib|gpu:a100:4(S:0,1),nvme:1|Not responding
n10|idle|low*|4|8000|(null)|gpu:2,gpu:3g.20gb:1|none
"""
PARTITIONS = """\
PartitionName=low
   AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL
   AllocNodes=ALL Default=YES QoS=N/A
   DefaultTime=01:00:00 DisableRootJobs=NO ExclusiveUser=NO GraceTime=10 Hidden=NO
   MaxNodes=UNLIMITED MaxTime=1-12:30:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED
   Nodes=n[1-2]
   PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO
   OverTimeLimit=NONE PreemptMode=REQUEUE
   State=UP TotalCPUs=8 TotalNodes=2 SelectTypeParameters=NONE

PartitionName=high
   AllocNodes=ALL Default=NO QoS=N/A
   DefaultTime=01:00:00 DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO
   MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED
   Nodes=n[1-2]
   PriorityJobFactor=1 PriorityTier=10 RootOnly=NO ReqResv=NO OverSubscribe=NO
   OverTimeLimit=NONE PreemptMode=OFF
   State=UP TotalCPUs=8 TotalNodes=2 SelectTypeParameters=NONE

"""
CONFIG = """\
Configuration data as of 2026-11-21T02:48:13
ClusterName             = sandbox_19149d166f57
JobRequeue              = 1
KillWait                = 5 sec
PreemptMode             = REQUEUE
PreemptParameters       = (null)
SLURM_VERSION           = 22.05.8
"""


class TestJobs:
    def test_a_running_job_whose_name_and_comment_look_like_fields(self) -> None:
        (job,) = slurm.parse_jobs(RUNNING)
        assert job.job_id == "1"
        assert (job.state, job.reason, job.restarts) == ("RUNNING", "None", 0)
        assert job.nodes == ("n1", "n2")
        assert job.batch_host == "n1"
        assert job.end_time == datetime(2026, 11, 21, 3, 48, 12)
        assert job.preempt_time is None
        assert not job.ended

    def test_a_member_of_an_array_goes_by_its_array_name(self) -> None:
        (job,) = slurm.parse_jobs(MEMBER)
        assert job.job_id == "3_2"
        assert job.restarts == 2
        assert job.preempt_time == datetime(2026, 11, 21, 2, 42, 40)

    def test_members_that_still_wait_together_have_no_nodes_yet(self) -> None:
        (job,) = slurm.parse_jobs(PENDING_ARRAY)
        assert job.job_id == "2_1-2"
        assert job.nodes == ()
        assert job.batch_host is None
        assert job.excluded == ("n1", "n3")

    def test_several_records_keep_apart(self) -> None:
        jobs = slurm.parse_jobs(MEMBER + RUNNING + PENDING_ARRAY)
        assert [job.job_id for job in jobs] == ["3_2", "1", "2_1-2"]
        assert slurm.parse_jobs("No jobs in the system\n") == []

    @pytest.mark.parametrize(
        ("state", "ended"),
        [
            ("COMPLETED", True),
            ("CANCELLED", True),
            ("NODE_FAIL", True),
            ("COMPLETING", False),
            ("PENDING", False),
        ],
    )
    def test_ended_means_that_it_will_not_run_again(self, state: str, ended: bool) -> None:
        (job,) = slurm.parse_jobs(MEMBER.replace("JobState=RUNNING", f"JobState={state}"))
        assert job.ended is ended

    @pytest.mark.parametrize(
        ("state", "running", "leaving"),
        [
            ("RUNNING", True, False),
            ("SIGNALING", True, False),
            ("COMPLETING", False, True),
            ("CANCELLED", False, True),
            ("CANCELLED+COMPLETING", False, True),
            ("PENDING", False, False),
            ("WORD_OF_A_LATER_VERSION", False, False),
        ],
    )
    def test_whether_it_has_its_nodes(self, state: str, running: bool, leaving: bool) -> None:
        (job,) = slurm.parse_jobs(MEMBER.replace("JobState=RUNNING", f"JobState={state}"))
        assert (job.running, job.leaving) == (running, leaving)

    def test_an_exit_code_with_a_signal(self) -> None:
        (job,) = slurm.parse_jobs(MEMBER.replace("ExitCode=0:0", "ExitCode=85:9"))
        assert job.exit_code == 85


def test_the_queue() -> None:
    first, second, third = slurm.parse_queue(QUEUE)
    assert (first.job_id, first.state, first.reason, first.nodes) == ("2_1", "PENDING", "Resources", ())
    assert second.start_time is None
    assert third.nodes == ("n1", "n2")
    assert third.name == "a | b JobState=FAKE"


def test_nodes_with_all_their_partitions() -> None:
    first, second, tenth = slurm.parse_nodes(NODES)
    assert (first.name, first.state, first.responding) == ("n1", "mixed", True)
    assert first.partitions == ("low", "high")
    assert first.reason == ""
    assert (second.name, second.state, second.responding, second.reason) == (
        "n2",
        "down",
        False,
        "Not responding",
    )
    assert (tenth.name, tenth.cpus, tenth.memory_mb) == ("n10", 4, 8000)
    assert (first.features, first.gpus, first.gpu_count) == ((), (), 0)
    assert (second.features, second.gpus) == (("a100", "ib"), (slurm.Gpus("a100", 4),))
    assert tenth.gpus == (slurm.Gpus("", 2), slurm.Gpus("3g.20gb", 1))
    assert tenth.gpu_count == 3


def test_partitions() -> None:
    low, high = slurm.parse_partitions(PARTITIONS)
    assert (low.name, low.default, low.grace_seconds) == ("low", True, 10)
    assert low.nodes == ("n1", "n2")
    assert (high.name, high.default, high.grace_seconds) == ("high", False, 0)
    assert (low.max_seconds, high.max_seconds) == (129600 + 1800, None)
    assert (low.state, low.preempt_mode, high.preempt_mode) == ("UP", "REQUEUE", "OFF")
    assert (low.max_nodes, low.min_nodes, low.max_memory_mb) == (None, 0, None)
    assert (low.accounts, low.denied_accounts, low.qos) == (None, (), None)
    listed = PARTITIONS.replace("AllowAccounts=ALL AllowQos=ALL", "AllowAccounts=a,b DenyQos=long")
    (narrow, _) = slurm.parse_partitions(listed.replace("MaxNodes=UNLIMITED", "MaxNodes=3 MaxMemPerNode=4G"))
    assert narrow.max_memory_mb == 4096
    assert (narrow.accounts, narrow.denied_qos, narrow.max_nodes) == (("a", "b"), ("long",), 3)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2-00:00:00", 172800),
        ("1-12:30", 131400),
        ("04:00:00", 14400),
        ("00:30", 30),
        ("UNLIMITED", None),
        ("INFINITE", None),
        ("", None),
    ],
)
def test_spans(text: str, seconds: int | None) -> None:
    assert slurm.parse_span(text) == seconds


def test_what_accounting_says() -> None:
    vision, common = slurm.parse_associations("vision||normal,long|normal|gpus\ncommon|low|||gpus\n")
    assert vision == slurm.Association("vision", "", ("normal", "long"), "normal", "gpus")
    assert common == slurm.Association("common", "low", (), "", "gpus")
    assert slurm.parse_qos("normal||\nlong|7-00:00:00|DenyOnLimit,PartitionTimeLimit\n") == {
        "normal": slurm.Qos(None),
        "long": slurm.Qos(604800, ("DenyOnLimit", "PartitionTimeLimit")),
    }


def test_an_expected_start() -> None:
    said = (
        "sbatch: Job 3 to start at 2026-11-21T04:48:00 using 4 processors on nodes n[1-2] in partition low\n"
    )
    assert slurm.parse_start(said) == slurm.Start(datetime(2026, 11, 21, 4, 48), ("n1", "n2"), "low")
    assert slurm.parse_start("sbatch: Job 3 to start at Unknown using 4 processors on nodes n1\n") is None
    assert slurm.parse_start("") is None


def test_settings() -> None:
    settings = slurm.parse_config(CONFIG)
    assert settings["ClusterName"] == "sandbox_19149d166f57"
    assert settings["KillWait"] == "5 sec"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3,07],gpu2", ["n1", "n2", "n3", "n07", "gpu2"]),
        ("rack[1-2]n[08-10]", [f"rack{r}n{n}" for r in "12" for n in ("08", "09", "10")]),
        ("a[1]-ib,b", ["a1-ib", "b"]),
        ("(null)", []),
        ("", []),
    ],
)
def test_host_lists(text: str, names: list[str]) -> None:
    assert list(slurm.expand_nodes(text)) == names


@given(st.integers(0, 999), st.integers(0, 50), st.integers(1, 5))
def test_a_padded_range_of_hosts_is_what_printf_says(first: int, more: int, width: int) -> None:
    text = f"n[{first:0{width}d}-{first + more:0{width}d}]"
    assert list(slurm.expand_nodes(text)) == [f"n{n:0{width}d}" for n in range(first, first + more + 1)]


def test_variables_that_would_change_the_answers_are_kept_from_the_programs() -> None:
    given_ = {"SQUEUE_STATES": "all", "SLURM_TIME_FORMAT": "relative", "SLURM_CONF": "/x", "HOME": "/h"}
    plain = slurm.plain_environment(given_)
    assert "SQUEUE_STATES" not in plain
    assert plain["SLURM_TIME_FORMAT"] == "standard"
    assert (plain["SLURM_CONF"], plain["HOME"]) == ("/x", "/h")


def test_without_the_programs_slurm_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(slurm.SlurmUnavailable, match="no scontrol on the PATH"):
        slurm.Slurm().job("1")


def test_a_program_that_hangs_is_no_answer(programs) -> None:
    programs(squeue="exec sleep 30")
    with pytest.raises(slurm.SlurmUnavailable, match=r"no answer in 0\.2 s"):
        slurm.Slurm(timeout=0.2).queue()


def test_an_answer_that_cannot_be_read_is_none(programs) -> None:
    """A verdict then rests on the run's folder alone, and a list of runs is shown without their jobs."""
    programs(
        scontrol="echo 'JobId=7 JobState=RUNNING Restarts=few'",
        sinfo="echo 'n1|idle|low*|many|8000|(null)|(null)|none'",
        squeue="echo '7|RUNNING|low|me|0:01|1:00|N/A|n[one]|None|a'",
    )
    asked = slurm.Slurm()
    for question in (lambda: asked.job("7"), asked.nodes, asked.queue, asked.kill_wait):
        with pytest.raises(slurm.SlurmUnavailable, match="SLURM's answer cannot be read"):
            question()


def test_asking_and_the_sandbox_need_the_standard_library_only() -> None:
    code = (
        "import sys, tools.slurm, tools.sandbox.sandbox;"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "yaml", "pydantic", "submitit"} & set(done.stdout.split())


def test_a_configuration_that_is_gone_is_told_at_once(tmp_path) -> None:
    with pytest.raises(slurm.SlurmUnavailable, match=r"SLURM_CONF names .*gone\.conf, which does not exist"):
        slurm.Slurm(tmp_path / "gone.conf").config()


def test_what_is_neither_a_job_nor_a_run_is_refused(tmp_path) -> None:
    assert job_of("17_3") == "17_3"
    with pytest.raises(UserError, match="neither a job id"):
        job_of(tmp_path / "absent")
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="has not started"):
        job_of(tmp_path / "run")


def test_a_run_folder_stands_for_the_job_of_its_newest_attempt(tmp_path) -> None:
    from clipcluster.runs.folder import Run

    run = Run.create(tmp_path / "run", {"name": "a"}, {})
    run.claim("17_3", host="n1", still_running=lambda job: False)
    run.claim("18", host="n2", still_running=lambda job: False)
    assert job_of(run.path) == "18"
