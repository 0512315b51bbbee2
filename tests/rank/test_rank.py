"""A rank opens its attempt, keeps its log, and ends with the right code and outcome: real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipcluster.rank.claiming import _torchrun_store
from clipcluster.runs import files, merge
from clipcluster.runs.folder import Run
from clipcluster.runtime.job_id import local_job_id
from clipcluster.runtime.launch import Launch

SERVE = """
import os, sys
from clipcluster.runtime.stop import Stop
stop = Stop()
stop.install(interactive=True)
from clipcluster.rank.serve import serve
code = serve(sys.argv[1], sys.argv[2], stop)
try:
    sys.stdout.flush(), sys.stderr.flush()
except OSError:
    pass
os._exit(code)
"""
LAUNCHERS = (
    "SLURM_",
    "SUBMITIT_",
    "CLIPCLUSTER_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "MASTER_",
    "TORCH",
)


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "digits-00000000", {"seed": 1}, {})


@pytest.fixture
def attempt(run):
    return run.claim("4711", host="n1", still_running=lambda job: False)


_started = []


@pytest.fixture(autouse=True)
def _none_left():
    """No rank outlives its test."""
    yield
    for process in _started:
        if process.poll() is None:
            process.kill()
            process.communicate()
    _started.clear()


def start(run, trainee, *, module="trainees", **environ):
    """One rank, in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, run.path, f"{module}:{trainee}"],
        env={**clean, "PYTHONPATH": path, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _started.append(process)
    return process


def local(attempt, rank, size):
    """What the batch script's local twin and submitit set for a rank."""
    return {
        "CLIPCLUSTER_ATTEMPT": str(attempt.number),
        "SUBMITIT_LOCAL_JOB_ID": "99",
        "SUBMITIT_LOCAL_NTASKS": str(size),
        "SUBMITIT_LOCAL_GLOBALID": str(rank),
        "SUBMITIT_LOCAL_LOCALID": str(rank),
    }


def serve(attempt, trainee, *, size=1, module="trainees", **environ):
    """All ranks to their end; returns their exit codes."""
    run = Run(attempt.run)
    ranks = [
        start(run, trainee, module=module, **local(attempt, rank, size), **environ) for rank in range(size)
    ]
    for rank in ranks:
        rank.communicate(timeout=60)
    return [rank.returncode for rank in ranks]


def kinds(attempt, rank=0):
    return [line["event"] for line in files.read_lines(attempt.path / f"events-rank-{rank}.jsonl")]


def log(attempt, rank=0):
    return (attempt.path / f"rank-{rank}.out").read_text()


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_finished(attempt):
    assert serve(attempt, "finish") == [0]
    outcome = attempt.outcome()
    assert (outcome["outcome"], outcome["code"], outcome["step"], outcome["go_on"]) == (
        "finished",
        0,
        7,
        False,
    )
    assert (outcome["rank"], outcome["host"]) == (0, socket.gethostname())
    assert kinds(attempt) == ["start", "finish"]


def test_everything_lands_in_the_ranks_log(attempt):
    serve(attempt, "finish")
    lines = log(attempt).splitlines()
    for line in (
        "from Python",
        "to stderr",
        "from the descriptor",
        "from a child",
        "to its stderr",
        "torch loaded: False",
    ):
        assert line in lines


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_stopped_by_a_signal(run, attempt, name):
    process = start(run, "until_stopped", **local(attempt, 0, 1))
    wait_until(lambda: "ready" in kinds(attempt))
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=30)
    assert process.returncode == 85
    outcome = attempt.outcome()
    assert (outcome["outcome"], outcome["code"], outcome["step"], outcome["go_on"]) == (
        "stopped",
        85,
        3,
        True,
    )


def test_a_signal_during_the_import_of_the_trainee_is_kept(run, attempt):
    process = start(run, "train", module="slow_import", **local(attempt, 0, 1))
    wait_until(lambda: "start" in kinds(attempt))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 85


def test_the_other_ranks_leave_after_the_outcome(attempt):
    assert serve(attempt, "rank_0_is_slow", size=2) == [85, 85]
    assert attempt.outcome()["rank"] == 0
    assert "no outcome" not in log(attempt, 1)


@pytest.mark.parametrize(
    ("name", "code", "ends_run"),
    [
        ("RecipeFailure", 89, True),
        ("UserError", 89, True),
        ("DataError", 90, True),
        ("MemoryError", 91, True),
        ("OutOfMemory", 91, True),
        ("NonFiniteError", 92, True),
        ("CheckpointError", 93, True),
        ("TypeError", 86, True),
        ("AssertionError", 86, True),
        ("RuntimeError", 86, False),
        ("OSError", 86, False),
        ("LostPeers", 87, False),
    ],
)
def test_exceptions(attempt, name, code, ends_run):
    assert serve(attempt, "fail", RAISE=name) == [code]
    outcome = attempt.outcome()
    assert (outcome is not None) == ends_run
    if outcome:
        assert (outcome["outcome"], outcome["code"], outcome["go_on"]) == ("failed", code, False)
        assert "on purpose" in outcome["reason"]
    (event,) = [line for line in merge.events(Run(attempt.run)) if line["event"] == "fail"]
    assert event["code"] == code
    assert "on purpose" in event["reason"]
    assert "Traceback" in log(attempt)


def test_the_same_error_at_the_same_step_can_be_recognised(run):
    """An attempt after another: what the verdict compares, whatever the addresses in the message."""
    known = []
    for _ in range(2):
        start(run, "fail_at_a_step").communicate(timeout=30)
        (event,) = files.read_lines(run.newest().path / "events-rank-0.jsonl")[1:]
        known.append({key: event[key] for key in ("event", "outcome", "step", "signature")})
    assert (
        known[0]
        == known[1]
        == {
            "event": "fail",
            "outcome": "error",
            "step": 5,
            "signature": "RuntimeError: shape of <Tensor at ?> does not fit (peer ?, pid ?)",
        }
    )


@pytest.mark.parametrize("trainee", ["leave_with_a_code", "interrupt"])
def test_no_way_out_gives_1(attempt, trainee):
    assert serve(attempt, trainee) == [86]
    assert attempt.outcome() is None


@pytest.mark.parametrize(("module", "trainee"), [("rank_nowhere", "train"), ("trainees", "nowhere")])
def test_a_trainee_that_is_not_there_started(attempt, module, trainee):
    assert serve(attempt, trainee, module=module) == [86]
    assert kinds(attempt) == ["start", "fail"]
    assert "nowhere" in log(attempt)


def test_what_all_found_rank_0_says(attempt):
    assert serve(attempt, "fail_together", size=2) == [92, 92]
    outcome = attempt.outcome()
    assert (outcome["rank"], outcome["reason"], outcome["advice"]) == (0, "not finite", "lower optim.lr")


def test_what_one_rank_knows_it_says_itself(attempt):
    assert serve(attempt, "fail_on_rank_1", size=2) == [87, 90]
    outcome = attempt.outcome()
    assert (outcome["rank"], outcome["code"], outcome["reason"]) == (1, 90, "0.tar changed")


@pytest.mark.parametrize("error", ["", "DataError", "RuntimeError", "LostPeers", "StaleAttempt"])
def test_an_overtaken_rank_writes_nothing_more(attempt, error):
    assert serve(attempt, "overtaken", RAISE=error) == [88]
    assert attempt.outcome() is None
    assert kinds(attempt) == ["start"]


def test_an_attempt_that_is_stale_from_the_beginning(run, attempt):
    run.claim("4711", host="n2", still_running=lambda job: False)
    assert serve(attempt, "finish") == [88]
    assert sorted(path.name for path in attempt.path.iterdir()) == ["claim.json", "settings.yaml"]


def test_a_full_disk_keeps_the_code(attempt):
    assert serve(attempt, "full_disk") == [90]
    assert attempt.outcome() is None
    assert [path for path in attempt.path.iterdir() if path.name.endswith(".part")] == []


@pytest.mark.parametrize(
    ("what", "code", "ends_run"), [("memory", 91, True), ("host memory", 91, True), ("peer", 87, False)]
)
def test_errors_of_torch(attempt, what, code, ends_run):
    assert serve(attempt, "with_torch", RAISE=what) == [code]
    assert (attempt.outcome() is not None) == ends_run


@pytest.mark.parametrize(("given", "expected"), [({}, "0"), ({"OMP_WAIT_POLICY": "active"}, "30000000000")])
def test_threads_that_wait_do_not_spin(attempt, given, expected):
    """What torch's OpenMP read when it was loaded."""
    assert serve(attempt, "with_torch", RAISE="peer", OMP_DISPLAY_ENV="verbose", **given) == [87]
    assert f"GOMP_SPINCOUNT = '{expected}'" in log(attempt)


def test_alone_it_claims_by_itself(run):
    first = start(run, "leave_with_a_code")
    first.communicate(timeout=30)
    second = start(run, "finish")
    second.communicate(timeout=30)
    assert (first.returncode, second.returncode) == (86, 0)
    assert [attempt.number for attempt in run.attempts()] == [1, 2]
    assert run.newest().job.startswith(f"local-{socket.gethostname()}-")
    again = start(run, "finish")
    said = again.communicate(timeout=30)[0]
    assert again.returncode == 0
    assert "finished already" in said
    assert run.newest().number == 2


def test_a_run_that_somebody_trains_is_refused(run):
    owner = start(run, "until_stopped")
    wait_until(lambda: run.newest() and "ready" in kinds(run.newest()))
    job = run.newest().job
    other = start(run, "finish")
    said = other.communicate(timeout=30)[1]
    assert other.returncode == 2
    assert job in said
    assert "Traceback" not in said
    owner.terminate()
    owner.communicate(timeout=30)
    assert owner.returncode == 85


def test_a_job_nobody_here_knows_can_be_written_off(run):
    run.claim("4711", host="elsewhere", still_running=lambda job: False)
    refused = start(run, "finish")
    said = refused.communicate(timeout=30)[1]
    assert refused.returncode == 2
    assert "CLIPCLUSTER_TAKE_OVER=4711" in said
    taken = start(run, "finish", CLIPCLUSTER_TAKE_OVER="4711")
    taken.communicate(timeout=30)
    assert taken.returncode == 0
    assert run.newest().number == 2


def test_a_job_that_left_an_outcome_needs_no_asking(run, attempt):
    attempt.write_outcome(outcome_name="stopped", code=85, rank=0)
    process = start(run, "finish")
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert run.newest().number == 2


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, "CLIPCLUSTER_ATTEMPT is not set"),
        (
            {
                "SLURM_JOB_ID": "1",
                "SLURM_PROCID": "0",
                "SLURM_STEP_ID": "0",
                "CLIPCLUSTER_ATTEMPT": "1",
            },
            "job 4711 claimed; this is job 1",
        ),
        ({"CLIPCLUSTER_ATTEMPT": "x"}, "CLIPCLUSTER_ATTEMPT is 'x'"),
        ({"CLIPCLUSTER_ATTEMPT": "2"}, "no attempt 2; there are: 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT is not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
            "MASTER_PORT is 'x'; it must be a whole number",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "9"},
            "Rank 0 cannot listen on MASTER_ADDR:MASTER_PORT, 192.0.2.1:9",
        ),
    ],
)
def test_what_cannot_be_joined_is_told(run, attempt, environ, message):
    process = start(run, "finish", **environ)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 2
    assert message in said
    assert "Traceback" not in said
    assert run.newest().number == 1
    assert attempt.outcome() is None


def test_a_slurm_step_of_the_claiming_job(run, attempt):
    environ = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "CLIPCLUSTER_ATTEMPT": "1"}
    process = start(run, "finish", **environ)
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_no_run_folder(tmp_path):
    process = start(Run(tmp_path / "nowhere"), "finish")
    assert "is not a run folder" in process.communicate(timeout=30)[1]
    assert process.returncode == 2


def test_who_starts_a_run_by_hand_is_told_where_it_prints_and_how_it_ended(run):
    process = start(run, "finish")
    said = process.communicate(timeout=30)[0].splitlines()
    assert said == [
        f"{run.name}: attempt 1; to follow it: clipcluster logs -f {run.path}",
        f"{run.name}: finished at step 7",
    ]
    process = start(run, "finish")
    assert "finished already" in process.communicate(timeout=30)[0]


def test_a_rank_of_a_claimed_attempt_prints_into_its_log_alone(run, attempt):
    environ = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "CLIPCLUSTER_ATTEMPT": "1"}
    assert start(run, "finish", **environ).communicate(timeout=30) == ("", "")


def torchrun(run, trainee, **environ):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(run, trainee, RANK=str(rank), LOCAL_RANK=str(rank), **shared, **environ) for rank in range(2)
    ]


def test_under_torchrun_rank_0_claims_for_all(run):
    ranks = torchrun(run, "launches")
    for rank in ranks:
        rank.communicate(timeout=60)
    assert [rank.returncode for rank in ranks] == [0, 0]
    said = [json.loads((run.path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [line["attempt"] for line in said] == [1, 1]
    assert {line["job"] for line in said} == {run.newest().job}
    assert [attempt.number for attempt in run.attempts()] == [1]


def test_under_torchrun_a_refusal_reaches_all(run):
    run.claim(local_job_id(), host="n1", still_running=lambda job: False)  # this test's own process owns it
    ranks = torchrun(run, "launches")
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert local_job_id() in said[0]
    assert "Rank 0 could not claim" in said[1]
    assert run.newest().number == 1


def test_without_an_agent_rank_0_holds_the_store_on_its_address_alone(run, monkeypatch):
    with socket.create_server(("127.0.0.2", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.2")
    monkeypatch.setenv("MASTER_PORT", str(port))
    store = _torchrun_store(Launch(0, 2, 0, 2, 0, 1, "1", "torchrun"))
    store.set("key", "value")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
