"""The throwaway cluster itself: it starts, evicts, loses nodes and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clipcluster.errors import UserError
from clipcluster.runs.folder import Run
from jobs.cli.app import main
from tools.sandbox import config as sandbox_config
from tools.sandbox import hostname as sandbox_hostname
from tools.sandbox import sandbox as sandboxes
from tools.sandbox.config import Sandbox
from tools.sandbox.preempt import preempt, release
from tools.sandbox.processes import owned
from tools.slurm import Slurm, SlurmRefused, SlurmUnavailable

pytestmark = pytest.mark.slurm

# Ranks that leave with 85 when asked (their sleep gets the signal too, perhaps first), and a batch script
# that then requeues its own job.
REQUEUES = """#!/bin/bash
trap : TERM
srun bash -c 'trap "exit 85" TERM; sleep 300 & wait; exit 85'
rc=$?
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
[ $rc = 85 ] && scontrol requeue ${job:-$SLURM_JOB_ID}
exit $rc
"""


def wait_for(happened: Callable[[], object], what: str, seconds: float = 20) -> float:
    """Seconds until it happened; fails the test if it does not."""
    begin = time.monotonic()
    while not happened():
        assert time.monotonic() - begin < seconds, f"waited {seconds} s for: {what}"
        time.sleep(0.05)
    return time.monotonic() - begin


def submit(sandbox: Sandbox, *arguments: str, script: str = REQUEUES) -> str:
    file = sandbox.folder / "job.sh"
    file.write_text(script)
    return sandbox.slurm.submit("--output=/dev/null", *arguments, str(file))


def runs(sandbox: Sandbox, job: str) -> bool:
    state = sandbox.slurm.job(job)
    return state is not None and state.state == "RUNNING"


def tasks(sandbox: Sandbox, node: str | None = None) -> set[int]:
    return {p.pid for p in owned(sandbox) if p.kind == "task" and node in (None, p.node)}


def started(sandbox: Sandbox, job: str, ranks: int) -> None:
    """Wait until the job's ranks sleep (each a shell and its sleep)."""
    wait_for(lambda: runs(sandbox, job), f"job {job} to run")
    names = lambda: [comm(pid) for pid in tasks(sandbox)]  # noqa: E731
    wait_for(lambda: names().count("sleep") >= ranks, f"{ranks} ranks of job {job}")


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def room(sandbox: Sandbox) -> Iterator[Path]:
    """A folder for a sandbox of one's own; what a failing test leaves running there is ended."""
    with tempfile.TemporaryDirectory(prefix="clipcluster-test-", dir="/tmp") as folder:
        yield Path(folder) / "mine"
        sandboxes.stop(Path(folder) / "mine", patience=0)


class TestCluster:
    def test_nodes_and_partitions_are_as_promised(self, sandbox: Sandbox) -> None:
        assert [node.name for node in sandbox.slurm.nodes()] == ["n1", "n2", "n3", "n4"]
        assert {node.cpus for node in sandbox.slurm.nodes()} == {4}
        partitions = {partition.name: partition for partition in sandbox.slurm.partitions()}
        assert set(partitions) == {"low", "high"}
        assert partitions["low"].default
        assert partitions["low"].grace_seconds == 10
        assert sandbox.slurm.kill_wait() == 5

    def test_a_job_starts_at_once_and_everything_listens_on_loopback_only(self, cluster: Sandbox) -> None:
        job = submit(cluster, "--nodes=2", "--ntasks=4")
        latency = wait_for(lambda: runs(cluster, job), "the job to run")
        assert latency < 5
        started(cluster, job, 4)
        pids = {process.pid for process in owned(cluster)}
        addresses = listening(pids)
        assert len(addresses) >= 6, "slurmctld, four slurmds and srun listen"
        assert set(addresses) == {"127.0.0.1"}

    @pytest.mark.long
    def test_a_second_sandbox_stands_beside_the_first(self, sandbox: Sandbox, room: Path) -> None:
        other = sandboxes.start(room, nodes=1, cpus=2)
        assert other.cluster != sandbox.cluster
        job = submit(other, script="#!/bin/sh\nexit 3\n")
        wait_for(lambda: other.slurm.job(job).ended, "the job to end")
        assert other.slurm.job(job).exit_code == 3
        sandboxes.stop(room)
        assert sandboxes.status(sandbox.folder).running

    def test_the_client_tells_no_answer_from_a_refusal(self, cluster: Sandbox, room: Path) -> None:
        assert cluster.slurm.job("99999") is None
        assert cluster.slurm.queue(job_ids=["99999"]) == []
        with pytest.raises(SlurmRefused, match="Invalid job id"):
            cluster.slurm.requeue("99999")
        job = submit(cluster, "--begin=now+1hour")
        assert int(job) >= cluster.first_job > 1, "no job of an older cluster is meant by it"
        cluster.slurm.exclude(job, ["n1", "n3"])
        assert cluster.slurm.job(job).excluded == ("n1", "n3")
        assert [line.job_id for line in cluster.slurm.queue(job_ids=[job])] == [job]
        conf = room.with_name("dead.conf")
        conf.write_text(cluster.conf.read_text().replace(str(cluster.port), "1"))
        with pytest.raises(SlurmUnavailable):
            Slurm(conf, timeout=2).job("1")


class TestPreempt:
    def test_a_preempted_job_comes_back_without_the_long_wait(self, cluster: Sandbox) -> None:
        job = submit(cluster, "--nodes=2", "--ntasks=4")
        started(cluster, job, 4)
        result = preempt(cluster.folder, job)
        assert result.requeued
        assert result.evicted_after < cluster.grace_seconds
        started(cluster, job, 4)
        assert cluster.slurm.job(job).restarts == 1
        assert [line.job_id for line in cluster.slurm.queue()] == [job]

    def test_one_member_of_an_array(self, cluster: Sandbox) -> None:
        array = submit(cluster, "--array=1-2", "--ntasks=4", "--nodes=1")
        for member in ("1", "2"):
            started(cluster, f"{array}_{member}", 4)
        started(cluster, f"{array}_2", 8)
        result = preempt(cluster.folder, f"{array}_2")
        assert result.job_id == f"{array}_2"
        assert result.requeued
        wait_for(lambda: runs(cluster, f"{array}_2"), "the member to come back")
        assert cluster.slurm.job(f"{array}_2").restarts == 1
        assert cluster.slurm.job(f"{array}_1").restarts == 0

    def test_a_run_that_is_only_starting_is_waited_for(self, cluster: Sandbox, tmp_path: Path) -> None:
        run = Run.create(tmp_path / "late-00000000", {"name": "late"}, {})
        job = submit(cluster, f"--job-name={run.name}")
        started(cluster, job, 1)
        claim = threading.Timer(2, lambda: run.claim(job, host="n1", still_running=lambda job: False))
        claim.start()
        assert preempt(cluster.folder, run.path).requeued
        claim.join()
        never = Run.create(tmp_path / "never-00000000", {"name": "never"}, {})
        with pytest.raises(UserError, match="has not started"):
            preempt(cluster.folder, never.path)

    def test_a_job_that_ends_instead_is_said_to_have_ended(self, cluster: Sandbox) -> None:
        job = submit(cluster, script="#!/bin/sh\nsrun sleep 300\n")
        started(cluster, job, 1)
        result = preempt(cluster.folder, job)
        assert not result.requeued
        assert result.state == "FAILED"

    def test_jobs_that_share_a_node_go_too_and_come_back(self, cluster: Sandbox) -> None:
        job, neighbour = (submit(cluster, "--nodelist=n3", "--ntasks=1") for _ in range(2))
        started(cluster, job, 1)
        started(cluster, neighbour, 2)
        assert preempt(cluster.folder, job).requeued
        for evicted in (job, neighbour):
            wait_for(
                lambda evicted=evicted: runs(cluster, evicted), f"{evicted}: {cluster.slurm.job(evicted)}"
            )

    @pytest.mark.long
    def test_a_job_that_does_not_listen_is_killed_after_the_grace_time(self, cluster: Sandbox) -> None:
        job = submit(cluster, script="#!/bin/bash\ntrap '' TERM\nsrun bash -c 'trap \"\" TERM; sleep 300'\n")
        started(cluster, job, 1)
        result = preempt(cluster.folder, job)
        assert result.requeued
        assert result.evicted_after >= cluster.grace_seconds

    def test_the_user_signal_reaches_the_ranks_where_the_site_sends_it(self, room: Path) -> None:
        cluster = sandboxes.start(room, nodes=1, user_signal=True)
        mark = room / "usr2"
        script = REQUEUES.replace('trap "exit 85" TERM', f'trap "touch {mark}; exit 85" USR2')
        job = submit(cluster, "--signal=USR2@90", script=script)
        started(cluster, job, 1)
        assert preempt(room, job).requeued
        assert mark.exists()

    def test_wrong_jobs_are_refused(self, cluster: Sandbox, tmp_path: Path) -> None:
        waiting = submit(cluster, "--begin=now+1hour")
        high = submit(cluster, "--partition=high")
        wait_for(lambda: runs(cluster, high), "the job in high")
        for job, message in (
            (waiting, "PENDING"),
            (high, "partition high"),
            ("99999", "has no job"),
            (str(tmp_path / "absent"), "neither a job id"),
        ):
            with pytest.raises(UserError, match=message):
                preempt(cluster.folder, job)


class TestNodes:
    def test_kill_node_ends_all_on_it_and_nothing_else(self, cluster: Sandbox) -> None:
        job = submit(cluster, "--nodelist=n1,n2", "--ntasks=4")
        started(cluster, job, 4)
        others = {p.pid for p in owned(cluster) if p.node not in ("n2", "n1")}
        assert sandboxes.kill_node(cluster.folder, "n2") >= 4
        left = owned(cluster)
        assert not [process for process in left if process.node == "n2"]
        assert others <= {process.pid for process in left}

    def test_lose_node_leaves_the_ranks_alive(self, cluster: Sandbox) -> None:
        job = submit(cluster, "--nodelist=n2", "--ntasks=2")
        started(cluster, job, 2)
        ranks = tasks(cluster, "n2")
        sandboxes.lose_node(cluster.folder, "n2")
        assert "slurmd" not in {p.kind for p in owned(cluster) if p.node == "n2"}
        time.sleep(0.5)
        assert ranks <= tasks(cluster, "n2")

    @pytest.mark.long
    def test_a_dead_node_is_noticed_its_job_requeued_and_the_node_restored(self, cluster: Sandbox) -> None:
        job = submit(cluster, "--nodelist=n1,n2", "--ntasks=4")
        started(cluster, job, 4)
        sandboxes.kill_node(cluster.folder, "n2")
        wait_for(lambda: cluster.slurm.job(job).restarts == 1, "the job to be requeued", 60)
        sandboxes.restore_node(cluster.folder, "n2")
        release(cluster.folder, job, seconds=30)
        wait_for(lambda: runs(cluster, job), "the job to come back")

    def test_an_unknown_node_is_refused(self, sandbox: Sandbox) -> None:
        with pytest.raises(UserError, match=r"no node n9 .* n1, n2, n3, n4"):
            sandboxes.kill_node(sandbox.folder, "n9")


class TestStartAndStop:
    @pytest.mark.parametrize("blow", ["none", "controller killed"])
    def test_stop_leaves_nothing_and_touches_nobody_else(self, room: Path, blow: str) -> None:
        cluster = sandboxes.start(room, nodes=2)
        job = submit(cluster, "--nodes=2", "--ntasks=2")
        started(cluster, job, 2)
        shell = {**os.environ, **cluster.environment, "SLURMD_NODENAME": "n1", "SLURM_CLUSTER_NAME": "real"}
        with subprocess.Popen(["sleep", "60"], env=shell) as bystander:
            pids = {process.pid for process in owned(cluster)}
            assert bystander.pid not in pids
            if blow == "controller killed":
                control = next(p for p in owned(cluster) if comm(p.pid) == "slurmctld")
                os.kill(control.pid, signal.SIGKILL)
            begin = time.monotonic()
            sandboxes.stop(room)
            assert time.monotonic() - begin < 14
            assert not [pid for pid in pids if is_alive(pid)]
            assert owned(cluster) == []
            assert not room.exists()
            assert bystander.poll() is None
            bystander.kill()
        assert sandboxes.stop(room) == 0

    def test_stop_after_the_starter_was_killed(self, room: Path) -> None:
        code = f"import pathlib, tools.sandbox.sandbox as s; s.start(pathlib.Path({str(room)!r}), nodes=2)"
        with subprocess.Popen([sys.executable, "-c", code]) as starter:
            wait_for(lambda: (room / "log" / "slurmctld.log").exists(), "slurmctld to start")
            starter.kill()
        cluster = sandboxes.find(room)
        time.sleep(0.3)
        sandboxes.stop(room)
        assert owned(cluster) == []
        assert not room.exists()

    @pytest.mark.long
    def test_stop_can_keep_the_logs_and_a_start_takes_their_place(self, room: Path) -> None:
        sandboxes.start(room, nodes=1)
        sandboxes.stop(room, keep_logs=True)
        assert [entry.name for entry in room.iterdir()] == ["log"]
        assert (room / "log" / "slurmctld.log").stat().st_size > 0
        sandboxes.start(room, nodes=1)
        assert sandboxes.status(room).running

    @pytest.mark.long
    def test_a_folder_with_a_long_path(self, room: Path) -> None:
        deep = room / ("a" * 60) / ("b" * 60)
        cluster = sandboxes.start(deep, nodes=1)
        job = submit(cluster)
        started(cluster, job, 1)
        sandboxes.stop(deep, patience=0)
        assert not cluster.spool.exists()

    def test_a_folder_in_use_is_refused(self, sandbox: Sandbox, room: Path) -> None:
        with pytest.raises(UserError, match=r"runs in .* already"):
            sandboxes.start(sandbox.folder)
        room.mkdir()
        (room / "thesis.tex").touch()
        with pytest.raises(UserError, match="holds no sandbox"):
            sandboxes.start(room)
        assert sandboxes.stop(room) == 0
        assert (room / "thesis.tex").exists()
        with pytest.raises(UserError, match="no sandbox in"):
            sandboxes.status(room)

    @pytest.mark.parametrize("words", ["--nodes 0", "--cpus 0", "--grace -1", "--kill-wait 0"])
    def test_impossible_sizes_are_refused(
        self, room: Path, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = f"clipcluster sandbox start --dir {room} {words}"
        monkeypatch.setattr(sys, "argv", words.split())
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert f"'{words.split()[-2]}'" in capsys.readouterr().err
        assert not room.exists()

    def test_a_daemon_that_dies_shows_the_end_of_its_log(
        self, room: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        port = sandboxes.free_ports(2)
        with socket.create_server(("127.0.0.1", port + 1)):
            monkeypatch.setattr(sandboxes, "free_ports", lambda count: port)
            with pytest.raises(UserError, match=r"(?s)daemon of n1 ended.*n1\.log.*in use"):
                sandboxes.start(room, nodes=1)
        assert not room.exists()

    def test_without_slurm_the_message_names_the_package(
        self, room: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr(sandbox_config, "ADMIN_FOLDERS", ("/nowhere/sbin",))
        with pytest.raises(UserError, match=r"slurmctld.*apt-get install --no-install-recommends slurm-wlm"):
            sandboxes.start(room)


@pytest.mark.parametrize("name", [None, "no-such-name.invalid"])
def test_an_ordinary_user_on_a_machine_of_any_name(name: str | None, sandbox: Sandbox) -> None:
    """Start, run a job over two nodes and stop, in a process without root, or with that host name."""
    with tempfile.TemporaryDirectory(prefix="clipcluster-test-", dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        child = os.fork()
        if child == 0:
            os._exit(as_ordinary_user(Path(folder) / "sandbox", name))
        _, code = os.waitpid(child, 0)
        report = Path(folder) / "report"
        if os.waitstatus_to_exitcode(code) == sandbox_hostname.REFUSED:
            pytest.skip("this system allows no namespace for host names")
        assert os.waitstatus_to_exitcode(code) == 0, report.read_text() if report.exists() else "no report"


def as_ordinary_user(folder: Path, name: str | None) -> int:
    if os.getuid() == 0 and name is None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        if name is not None:
            try:
                sandbox_hostname.enter(name)
            except OSError:
                return sandbox_hostname.REFUSED
        cluster = sandboxes.start(folder, nodes=2)
        assert cluster.own_host_name == (name is not None)
        job = submit(cluster, "--nodes=2", "--ntasks=2")
        started(cluster, job, 2)
        assert set(listening({process.pid for process in owned(cluster)})) == {"127.0.0.1"}
        sandboxes.stop(folder)
        assert owned(cluster) == []
        return 0
    except BaseException as error:
        folder.with_name("report").write_text(repr(error))
        sandboxes.stop(folder, patience=0)
        return 1


def listening(pids: set[int]) -> list[str]:
    """The addresses on which these processes listen, from /proc/net."""
    inodes = set()
    for pid in pids:
        try:
            links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else []:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(address_of(fields[1].partition(":")[0]))
    return found


def address_of(text: str) -> str:
    """An address as /proc/net writes it: words of four bytes, each in the machine's byte order."""
    words = [bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, b"".join(words))
