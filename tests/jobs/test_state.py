"""What a run is said to be doing, from its folder and the queue alone."""

import io
import os
import socket
import subprocess
import time
from datetime import datetime, timedelta

import pytest
from rich.console import Console

from clipcluster.errors import UserError
from clipcluster.runs import evaluations, files
from clipcluster.runs.folder import Run
from clipcluster.runtime.job_id import local_job_id
from jobs import status, submissions
from jobs.accounting import ALLOCATED
from jobs.cancel import cancel
from jobs.cli.status_table import breakdown, span, status_table
from jobs.endings import history
from jobs.state import Queue, Watched, last_metrics, state_of
from jobs.status import groups, report, reports
from tools.slurm import Slurm, SlurmUnavailable, parse_jobs, parse_queue


class Answers(Queue):
    """A queue with these jobs: what SLURM would say, told by hand."""

    def __init__(self, waiting=None, *, ended=None, silent=False):
        lines = [
            f"{job}|{state}|low|me|0:00|1:00|N/A||{reason}|{name}\x1f{comment}"
            for job, (state, reason, name, comment) in (
                (job, (*told, "", "")[:4]) for job, told in (waiting or {}).items()
            )
        ]
        found = {job.job_id: job for job in parse_queue("\n".join(lines))}
        self.__dict__["_jobs"] = None if silent else found
        self._ended = ended or {}
        self.slurm = Slurm()

    def afterwards(self, job_id):
        """As SLURM remembers it: its state, or that and how many seconds ago it ended."""
        state, ago = told if isinstance(told := self._ended.get(job_id), tuple) else (told, 3600)
        end = datetime.now() - timedelta(seconds=ago)
        shown = f"JobId={job_id} JobState={state} EndTime={end:%Y-%m-%dT%H:%M:%S}"
        return parse_jobs(shown)[0] if state else None


def claimed(run, job="17"):
    return run.claim(job, host="n1", still_running=lambda job: False)


def judged(attempt, event, **fields):
    attempt.event(event, writer=history.WRITER, **{"ending": "crashed", "code": 85, "reason": "", **fields})


def submitted(run, job="17", ago=0.0):
    run.submitit.mkdir(exist_ok=True)
    files.append_lines(run.submitit / submissions.FILE, [{"job": job, "time": time.time() - ago}])


def test_before_and_while_it_waits(run):
    assert state_of(run, Answers()).name == "NEW"
    submitted(run)
    state = state_of(run, Answers({"17": ("PENDING", "Resources")}))
    assert (str(state), state.queued, state.ended) == ("PENDING (Resources)", True, False)
    assert state_of(run, Answers({"17": ("RUNNING", "None")})).detail == "starting"
    assert state_of(run, Answers()).name == "LOST"
    assert state_of(run, Answers(silent=True)).name == "UNKNOWN"


def test_while_it_runs_and_comes_back(run):
    attempt = claimed(run)
    assert str(state_of(run, Answers({"17": ("RUNNING", "None")}))) == "RUNNING"
    assert state_of(run, Answers({"17": ("COMPLETING", "None")})).name == "COMPLETING"
    judged(attempt, "requeue")
    assert str(state_of(run, Answers({"17": ("COMPLETING", "None")}))) == "PENDING (requeued)"
    assert str(state_of(run, Answers({"17": ("PENDING", "BeginTime")}))) == "PENDING (requeued, BeginTime)"
    held = state_of(run, Answers({"17": ("SPECIAL_EXIT", "JobHeldAdmin")}))
    assert str(held) == "PENDING (requeued, JobHeldAdmin)"


@pytest.mark.parametrize(
    ("event", "fields", "state", "code"),
    [
        ("finish", {"code": 0}, "FINISHED", 0),
        ("fail", {"code": 90, "reason": "shard 3 changed"}, "FAILED (shard 3 changed)", 90),
        ("cancel", {"code": 130, "reason": "scancel"}, "CANCELLED (scancel)", 130),
        ("stop", {"code": 85, "reason": "told"}, "STOPPED (told)", 85),
    ],
)
def test_a_final_verdict(run, event, fields, state, code):
    judged(claimed(run), event, **fields)
    for queue in (Answers(), Answers(silent=True)):
        found = state_of(run, queue)
        assert (str(found), found.code, found.queued) == (state, code, False)
    leaving = state_of(run, Answers({"17": ("COMPLETING", "None")}))
    assert (str(leaving), leaving.queued) == (state, True)


@pytest.mark.parametrize("event", ["note", "requeue", "cancel", "fail", "finish"])
def test_ranks_of_a_lost_node_finish_the_run_after_the_verdict(run, event):
    attempt = claimed(run)
    judged(attempt, event, code=85)
    attempt.write_outcome(outcome_name="finished", code=0, rank=0, reason="all steps done")
    assert str(state_of(run, Answers())) == "FINISHED"
    waiting = state_of(run, Answers({"17": ("PENDING", "BeginTime")}))
    assert (str(waiting), waiting.queued) == ("FINISHED", False)
    submitted(run, "18")  # which finds nothing to do
    assert str(state_of(run, Answers())) == "FINISHED"


def test_what_no_script_could_write(run):
    claimed(run)
    assert state_of(run, Answers()).name == "LOST"
    assert state_of(run, Answers(ended={"17": "CANCELLED"})).name == "CANCELLED"
    assert state_of(run, Answers(ended={"17": "TIMEOUT"})).name == "TIMEOUT"
    assert state_of(run, Answers(ended={"17": "NODE_FAIL"})).name == "LOST"
    run.mark_cancelled(["17"])
    assert state_of(run, Answers()).name == "CANCELLED"
    assert state_of(run, Answers({"17": ("RUNNING", "None")})).queued


def test_over_a_network_file_system_records_may_show_after_the_job_has_ended(run, monkeypatch):
    submitted(run)
    just = {code: Answers(ended={"17": (code, 5)}) for code in ("COMPLETED", "FAILED", "NODE_FAIL")}
    assert state_of(run, just["COMPLETED"]).name == "LOST", "a disk of this machine shows all at once"
    monkeypatch.setattr("jobs.state.shows_late", lambda folder: folder == run.path)
    assert str(state_of(run, just["COMPLETED"])) == "COMPLETING (its last records do not show here yet)"
    attempt = claimed(run)
    for ended in ("COMPLETED", "FAILED"):
        state = state_of(run, just[ended])
        assert (state.name, state.ended, state.queued) == ("COMPLETING", False, True)
        assert state_of(run, Answers(ended={"17": (ended, 91)})).name == "LOST"
    assert state_of(run, just["NODE_FAIL"]).name == "LOST"
    told = report(run, just["COMPLETED"])
    assert (told["state"], told["seconds_left"]) == ("COMPLETING", None)
    judged(attempt, "requeue")
    assert state_of(run, just["FAILED"]).name == "COMPLETING", "the attempt after it may show late, too"
    attempt.write_outcome(outcome_name="finished", code=0, rank=0, reason="all steps done")
    assert state_of(run, just["COMPLETED"]).name == "FINISHED"


def test_the_newest_job_is_known_whatever_the_clocks_say(run, monkeypatch):
    """The machine that submits is minutes ahead of the nodes, or behind them."""
    real = time.time
    order = []
    for job, submitter, node in (("17", 300, -300), ("18", -300, 300), ("19", 300, -300)):
        monkeypatch.setattr(time, "time", lambda ahead=submitter: real() + ahead)
        submissions.record(run, submissions.intend(run, "slurm", "code-1"), job=job)
        assert submissions.job_ids(run) == [*order, job]  # before it claims, or where it never does
        monkeypatch.setattr(time, "time", lambda ahead=node: real() + ahead)
        judged(claimed(run, job), "fail", reason=f"of {job}")
        order.append(job)
        assert submissions.job_ids(run) == order
        assert str(state_of(run, Answers())) == f"FAILED (of {job})"
    submissions.intend(run, "slurm", "code-1")
    assert submissions.unanswered(run) is not None
    claimed(run, "20")
    assert submissions.unanswered(run) is None
    assert submissions.job_ids(run) == [*order, "20"]


def test_cancelled_while_pending_after_a_requeue(run):
    judged(claimed(run), "requeue")
    assert state_of(run, Answers(ended={"17": "CANCELLED"})).name == "CANCELLED"
    assert state_of(run, Answers()).name == "LOST"


def test_a_refused_requeue_is_stopped(run):
    attempt = claimed(run)
    judged(attempt, "requeue")
    attempt.event("requeue_refused", writer=history.WRITER, reason="no")
    assert state_of(run, Answers()).name == "STOPPED"


def test_without_a_batch_script_the_outcome_is_the_verdict(run):
    attempt = claimed(run, "local-nowhere-1-1")
    assert state_of(run, Answers()).name == "UNKNOWN"
    attempt.write_outcome(outcome_name="stopped", code=85, rank=0, reason="SIGINT")
    assert str(state_of(run, Answers())) == "STOPPED (SIGINT)"


def test_a_new_submission_after_the_end(run):
    judged(claimed(run), "fail", code=86, reason="bug")
    submitted(run, "18")
    assert state_of(run, Answers({"18": ("PENDING", "Priority")})).name == "PENDING"
    assert str(state_of(run, Answers())) == (
        "LOST (job 18 ended without recording an outcome: it never claimed the run)"
    )
    assert state_of(run, Answers(ended={"18": "CANCELLED"})).name == "CANCELLED"


def test_an_older_job_that_never_claimed_tells_nothing(run):
    submitted(run, "17", ago=1)
    run.mark_cancelled(["17"])
    claimed(run, "local-nowhere-1-1")
    assert submissions.job_ids(run) == ["17", "local-nowhere-1-1"]
    assert state_of(run, Answers()).name == "UNKNOWN"


@pytest.fixture
def slurm(programs, tmp_path):
    """A folder of SLURM's programs: job 17 runs and cannot be ended; `asked` has every call of squeue."""
    asked = tmp_path / "programs" / "asked"
    return programs(
        squeue=f'echo "$@" >> {asked}; echo "17|RUNNING|low|me|0:01|1:00|N/A|n1|None|toy"',
        scancel="echo 'Socket timed out' >&2; exit 1",
    )


def test_the_queue_is_that_of_the_user_not_of_variables(slurm, monkeypatch):
    monkeypatch.setenv("LOGNAME", "somebody-else")
    assert not Queue().silent
    assert f"--user={os.getuid()}" in (slurm / "asked").read_text().split()


def test_who_watches_asks_slurm_seldom(run, slurm):
    claimed(run)
    watched = Watched(run)
    assert {watched.state().name for _ in range(5)} == {"RUNNING"}
    assert len((slurm / "asked").read_text().splitlines()) == 1


def test_a_job_that_cannot_be_ended_is_marked_and_said(run, slurm):
    claimed(run)
    with pytest.raises(UserError, match=r"job 17 could not be ended \(Socket timed out\).*scancel 17"):
        cancel(run, Queue())
    assert run.cancelled_jobs() == {"17"}


def test_a_report_reads_the_ends_of_files(run):
    attempt = claimed(run)
    for step in (1, 2, 3):
        attempt.metrics({"step": step, "loss": 1.0 / step, "samples_per_second": 5.0, "epoch": 0.1})
    with (attempt.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step":4,"lo')
    judged(attempt, "finish", code=0)
    assert last_metrics(run)["step"] == 3
    found = report(run, Answers())
    assert (found["state"], found["step"], found["total_steps"], found["attempt"]) == ("FINISHED", 3, 20, 1)
    assert found["last_event"] == "finish"
    assert status_table([found]).row_count == 1


def test_a_report_counts_steps_that_only_a_checkpoint_tells_of(run):
    attempt = claimed(run)
    attempt.metrics({"step": 5, "loss": 1.0})
    folder = run.checkpoints / "step-00000008"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "manifest.json").write_text('{"files": {"state.json": {"bytes": 2, "sha256": ""}}}')
    found = report(run, Answers())
    assert (found["step"], found["checkpoint"]) == (8, 8)


def shown(found, width):
    console = Console(width=width, file=io.StringIO())
    console.print(status_table(found, width))
    return console.file.getvalue().splitlines()


def running(run, *, step=30):
    """An attempt that has trained for 20 of its 25 seconds, and waits a fifth of its time for data."""
    now = time.time()
    attempt = claimed(run)
    claim = {**attempt.claim(), "time": now - 25}
    files.write_json(attempt.path / "claim.json", claim, private=True)
    attempt.event("start", writer="rank-0", rank=0)
    for at in range(10, step + 1, 10):
        samples = {"samples": 64 * at, "samples_per_second": 96.0, "data_wait_seconds": 10 * 64 / 96 / 5}
        attempt.metrics({"step": at, "loss": 1.5, **samples})
    attempt.step = step
    attempt.event(
        "spent", writer="rank-0", seconds={"train": 15.0, "data": 4.0, "evaluate": 1.0}, total_steps=90
    )
    return attempt


def test_a_running_run_at_a_glance(run):
    attempt = running(run)
    found = report(run, Answers({"17": ("RUNNING", "None")}))
    late = time.time() - attempt.claim()["time"] - 25  # a busy machine takes seconds to come here
    assert (found["step"], found["total_steps"], found["data_wait"]) == (30, 90, pytest.approx(0.2))
    # 60 steps of 64 samples at 96 samples/s, and an evaluation for every 19 seconds of training
    assert found["seconds_left"] == pytest.approx(60 * 64 / 96 * (1 + 1 / 19), rel=0.02)
    assert 15 / (25 + late) <= found["goodput"] <= (15 + late) / (25 + late)
    assert 25 <= sum(found["seconds"].values()) <= 25 + late
    (line,) = (line for line in shown([found], 200) if run.name in line)
    assert line.split()[:8] == [run.name, "RUNNING", "17", "1", "30/90", "1.5000", "96", "20%"]
    assert f"{found['goodput']:.1%}" in line
    (text,) = breakdown(found)
    assert text.startswith("of 0.01 device-hours: training ")
    assert "starting 2" in text
    narrow = shown([found], 70)
    assert all(len(line.rstrip()) <= 70 for line in narrow)
    assert [name in narrow[0] for name in ("run", "state", "step", "goodput", "data wait")] == [True] * 4 + [
        False
    ]


def test_a_crash_says_why_and_what_was_lost(run):
    attempt = running(run)
    judged(attempt, "requeue", ending="crashed", reason="srun: error: n1: task 1: Killed")
    found = report(run, Answers({"17": ("PENDING", "BeginTime")}))
    assert (found["ended"], found["lost_steps"]) == ("crashed", 30), "nothing was saved"
    assert found["goodput"] == 0
    assert found["seconds_left"] > 0
    text = "\n".join([*shown([found], 200), *breakdown(found)])
    assert "crashed: srun: error: n1: task 1: Killed" in text
    assert "30 steps lost" in text
    claimed(run)  # the next attempt has begun, and has not resumed yet
    assert report(run, Answers({"17": ("RUNNING", "None")}))["lost_steps"] == 30


def test_a_run_that_cannot_be_read_is_a_line_and_hides_no_other(run):
    broken = Run.create(run.path.parent / "broken-00000000", {"name": "broken"}, {})
    (claimed(broken).path / "claim.json").write_text("{")
    running(run)
    first, second = reports([broken, run], Answers({"17": ("RUNNING", "None")}))
    assert (first["state"], second["state"]) == ("UNREADABLE", "RUNNING")
    assert first.keys() == second.keys()
    assert "claim.json is not valid JSON" in first["detail"]
    lines = shown([first, second], 200)
    assert "UNREADABLE" in lines[1]
    assert breakdown(first) == []
    assert groups([first, second]) == [(None, [first]), (None, [second])]
    with pytest.raises(UserError, match=r"claim\.json is not valid JSON"):
        reports([broken], Answers())


def test_many_runs_are_read_by_several_processes_and_keep_their_order(run, monkeypatch):
    broken = Run.create(run.path.parent / "broken-00000000", {"name": "broken"}, {})
    (claimed(broken).path / "claim.json").write_text("{")
    judged(running(run), "fail", code=90, reason="disk full")
    queue, several = Answers({"17": ("RUNNING", "None")}), [run, broken, *[run] * 3]
    one_by_one = reports(several, queue)
    monkeypatch.setattr(status, "RUNS_A_PROCESS", 2)
    here = os.getpid()
    monkeypatch.setattr(status, "report", lambda run, queue: (os.getpid() == here, run.name))
    assert reports(several, queue) == [(False, one.name) for one in several]
    monkeypatch.undo()
    monkeypatch.setattr(status, "RUNS_A_PROCESS", 2)
    assert reports(several, queue) == one_by_one


def test_how_the_last_attempt_ended_is_said_where_it_left_no_verdict(run):
    judged(running(run), "requeue", ending="preempted")
    running(run)
    lost = report(run, Answers())
    assert (lost["state"], lost["ended"]) == ("LOST", "lost")
    (line,) = (line for line in shown([lost], 200) if "LOST" in line)
    assert "ended without" in line
    assert report(run, Answers({"17": ("RUNNING", "None")}))["ended"] == "preempted"
    run.mark_cancelled(["17"])
    assert report(run, Answers())["ended"] == "cancelled"


def test_a_new_job_that_starts_does_not_keep_the_last_attempt_alive(run):
    """The node of job 17 died; job 18 runs, and has not claimed the run yet."""
    attempt = running(run)
    for path in attempt.path.glob("*.jsonl"):
        lines = [{**line, "time": line["time"] - 5000} for line in files.read_lines(path)]
        path.unlink()
        files.append_lines(path, lines)
    files.write_json(attempt.path / "claim.json", {**attempt.claim(), "time": time.time() - 5025})
    submitted(run, "18")
    found = report(run, Answers({"18": ("RUNNING", "None")}))
    assert (found["state"], found["job"]) == ("RUNNING", "18")
    assert sum(found["seconds"][kind] for kind in ALLOCATED) == pytest.approx(25, abs=2)


def test_an_answer_from_before_the_claim_tells_of_no_requeue(run, slurm):
    line = "17|PENDING|low|me|0:00|1:00|N/A||Priority|toy"
    (slurm / "squeue").write_text(f"#!/bin/sh\necho '{line}'\n")
    submitted(run)
    before = Queue()
    before.ask()
    attempt = claimed(run)
    assert str(state_of(run, before)) == "RUNNING"
    assert str(state_of(run, Queue())) == "PENDING (requeued, Priority)"
    judged(attempt, "requeue")
    assert str(state_of(run, before)) == "PENDING (requeued, Priority)"


def test_what_holds_a_run_up_is_named(run):
    slow = {"ranks": [1], "nodes": ["n2"], "reason": "rank 1 on n2: the others wait"}
    running(run).event("slow", writer="rank-0", **slow)
    second = running(run)
    second.event(
        "stalled", writer="rank-2", ranks=[1], nodes=["n2"], seconds=400.0, reason="rank 1 stood still"
    )
    (second.path / "stalled").mkdir()
    third = running(run)
    queue = Answers({"17": ("RUNNING", "None")})
    found = report(run, queue)
    assert (found["slow"], found["stalls"]) == ({"ranks": [], "nodes": []}, [2])
    assert found["suspect_nodes"] == {"n2": [1, 2]}
    third.event("slow", writer="rank-0", **slow)
    found = report(run, queue)
    assert found["slow"] == {"ranks": [1], "nodes": ["n2"]}
    assert [note.partition(":")[0] for note in found["notes"]] == [
        "slow",
        "data-bound",
        "stalled in attempt 2",
        "suspect node n2",
    ]
    assert "20% of the last steps" in found["notes"][1]
    third.event("slow", writer="rank-0", ranks=[], nodes=[], reason="no rank any more")
    judged(third, "fail", code=90)
    found = report(run, Answers())
    assert [note.partition(":")[0] for note in found["notes"]] == ["stalled in attempt 2", "suspect node n2"]


def test_a_sweep_is_a_line_and_its_members_are_below_it(run):
    alone = Run.create(run.path.parent / "alone-00000000", {"name": "alone"}, {"plan": {"total_steps": 5}})
    members = []
    for number in range(2):
        member = Run.create(
            run.path.parent / f"lr-{number}-00000000", {"name": "lr"}, {"plan": {"total_steps": 90}}
        )
        files.write_json(member.path / "sweep.json", {"sweep": "lr", "values": {"optim.lr": number}})
        members.append(member)
    running(members[1])
    found = [report(one, Answers({"17": ("RUNNING", "None")})) for one in (members[0], alone, members[1])]
    assert [one["sweep"] for one in found] == ["lr", None, "lr"]
    lines = shown(found, 200)
    assert [line.split()[0] for line in lines] == [
        "run",
        "sweep",
        "lr-0-00000000",
        "lr-1-00000000",
        "alone-00000000",
    ]
    assert "1 NEW, 1 RUNNING" in lines[1]
    assert "30/180" in lines[1]


def test_the_table_keeps_names_and_states_whole_on_a_narrow_terminal(run):
    console = Console(width=80, file=io.StringIO())
    job = "local-node-with-a-long-name-123456-7890123"
    attempt = run.claim(job, host="n1", still_running=lambda job: False)
    judged(attempt, "cancel", code=130, reason="cancelled with clipcluster cancel")
    console.print(status_table([report(run, Answers())], 80))
    (line,) = (line for line in console.file.getvalue().splitlines() if run.name in line)
    assert line.split()[:3] == [run.name, "CANCELLED", "local"]


def test_without_slurm(run, no_slurm):
    claimed(run)
    queue = Queue()
    assert queue.silent
    assert state_of(run, queue).name == "UNKNOWN"
    with pytest.raises(SlurmUnavailable):
        queue.slurm.queue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (-1, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "119 min"),
        (9e4, "25 h"),
        (9e5, "10 d"),
    ],
)
def test_spans(seconds, text):
    assert span(seconds) == text


def test_a_launch_without_an_answer(run, monkeypatch):
    intent = submissions.intend(run, "slurm", "code-1")
    assert submissions.job_ids(run) == []
    state = state_of(run, Answers())
    assert (state.name, state.queued, state.ended) == ("SUBMITTING", True, False)
    assert intent.host in state.detail
    waits = Answers({"17": ("PENDING", "Priority", run.name, str(run.path))})
    assert (state_of(run, waits).name, state_of(run, waits).job) == ("PENDING", "17")
    others = Answers(
        {"17": ("PENDING", "Priority", run.name, "/elsewhere/toy"), "18": ("RUNNING", "", "x", str(run.path))}
    )
    assert state_of(run, others).name == "SUBMITTING"
    monkeypatch.setattr(submissions, "SETTLE_SECONDS", 0.0)
    assert state_of(run, Answers()).name == "NEW"
    assert state_of(run, Answers(silent=True)).name == "UNKNOWN"
    submissions.adopt(run, "17")
    submissions.adopt(run, "17")
    assert len(submissions.submissions(run)) == 1
    submissions.intend(run, "slurm", "code-1")
    claimed(run, "18")
    assert submissions.unanswered(run) is None
    assert submissions.job_ids(run) == ["17", "18"]


def test_a_job_of_slurm_does_not_wait_for_a_process_that_died_here(run, monkeypatch):
    with subprocess.Popen(["true"]) as process:
        dead = local_job_id(process.pid)
    alive = local_job_id()
    claimed(run, dead)
    submissions.record(run, submissions.intend(run, "local", "code-1"), job=alive)
    assert run.cancelled_jobs() == set()
    submissions.intend(run, "slurm", "code-1")
    assert run.cancelled_jobs() == {dead}
    monkeypatch.setattr(socket, "gethostname", lambda: "n1")  # where nobody can look for the process
    assert not history.job_runs(run, dead, Queue().slurm)
    assert history.job_runs(run, alive, Queue().slurm)


def test_a_launch_that_left_no_job_can_be_cancelled(run, monkeypatch):
    submissions.intend(run, "slurm", "code-1")
    with pytest.raises(UserError, match="until then its job may appear"):
        cancel(run, Answers())
    monkeypatch.setattr(submissions, "SETTLE_SECONDS", 0.0)
    with pytest.raises(UserError, match="cannot be asked here"):
        cancel(run, Answers(silent=True))
    assert state_of(run, Answers(silent=True)).name == "NEW"


def test_a_launch_with_an_answer(run):
    submissions.record(run, submissions.intend(run, "slurm", "code-1"), refused="no such partition")
    assert state_of(run, Answers()).name == "NEW"
    submissions.record(run, submissions.intend(run, "slurm", "code-1"), job="17")
    assert submissions.job_ids(run) == ["17"]
    assert state_of(run, Answers({"17": ("PENDING", "Priority")})).name == "PENDING"


def test_the_evaluations_of_a_run_are_named_and_cancelled_with_it(run):
    attempt = claimed(run)
    waiting, running, failed = (evaluations.owe(attempt, step) for step in (5, 10, 15))
    for owed, job in ((running, "20"), (failed, "21")):
        Run.create(owed.job.path, {"name": "toy"}, {})
        submitted(owed.job, job)
    judged(claimed(failed.job, "21"), "fail", code=90, reason="shard 3 changed")
    failed.give_up()
    queue = Answers({"17": ("RUNNING", "None"), "20": ("PENDING", "Priority")})
    found = report(run, queue)
    assert found["evaluations"] == [
        {"step": 5, "state": "OWED", "detail": "", "job": None},
        {"step": 10, "state": "PENDING", "detail": "Priority", "job": "20"},
        {"step": 15, "state": "FAILED", "detail": "shard 3 changed", "job": "21"},
    ]
    console = Console(width=100, file=io.StringIO())
    console.print(status_table([found], 100))
    lines = console.file.getvalue().splitlines()
    assert "evaluation of step 10" in lines[3]
    assert "PENDING (Priority)" in lines[3]
    assert lines[3].split()[-1] == "20"

    ended = []
    queue.slurm.cancel = ended.extend
    assert cancel(run, queue).splitlines() == [
        f"{run.name}: cancelled 17",
        f"{running.job.name}: cancelled 20",
    ]
    assert ended == ["17", "20"]
    assert running.job.cancelled_jobs() == {"20"}
    assert evaluations.owed_by(run) == []
    after = {one["step"]: one["state"] for one in report(run, Answers())["evaluations"]}
    assert after == {5: "CANCELLED", 10: "CANCELLED", 15: "FAILED"}
    assert waiting.name in {owed.name for owed in evaluations.failed_of(run)}
