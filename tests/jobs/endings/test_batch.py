"""The batch side's own process: what it loads, how long it takes, what it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.endings import history
from jobs.train import TrainJob

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "numpy", "pydantic", "submitit", "typer", "rich", "clipcluster.recipe.sections.recipe")


def endings(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "jobs.endings", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "SLURM_JOB_ID": "17", **environment},
    )


def test_the_verdict_loads_little(run):
    code = f"import sys, jobs.endings.__main__; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_verdict_is_quick(run, no_slurm):
    run.claim("17", host="n1", still_running=lambda job: False)
    seconds = []
    for _ in range(5):
        before = os.times()
        assert endings("verdict", run.path, 0, CLIPCLUSTER_ATTEMPT="9").returncode != 0  # no such attempt
        after = os.times()
        # processor time: wall time would tell of the machine's other work too
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert min(seconds) < 0.5


def test_claim_prints_the_number_alone(run, no_slurm):
    first = endings("claim", run.path)
    assert (first.returncode, first.stdout) == (0, "1\n")
    assert "attempt 1 of toy-00000000 begins (job 17 on" in first.stderr
    assert endings("claim", run.path).stdout == "2\n"
    other = endings("claim", run.path, SLURM_JOB_ID="18")
    assert (other.returncode, other.stdout) == (88, "")
    assert "owned by job 17" in other.stderr
    run.mark_cancelled(["17"])
    cancelled = endings("claim", run.path)
    assert (cancelled.returncode, cancelled.stdout) == (0, "")


def test_a_run_that_was_finished_after_the_verdict_is_recorded_as_such(run, no_slurm):
    attempt = run.claim("17", host="n1", still_running=lambda job: False)
    attempt.event("note", writer=history.WRITER, ending="requeued already", code=85)
    attempt.write_outcome(outcome_name="finished", code=0, rank=0)
    for job in ("17", "18"):
        done = endings("claim", run.path, SLURM_JOB_ID=job)
        assert (done.returncode, done.stdout) == (0, "")
    finish = {"event": "finish", "ending": "finished", "code": 0, "time": attempt.outcome()["time"]}
    assert [{key: line[key] for key in finish} for line in history.batch_events(attempt)[1:]] == [finish]


def test_claim_knows_members_of_arrays(run, no_slurm):
    endings("claim", run.path, SLURM_ARRAY_JOB_ID="40", SLURM_ARRAY_TASK_ID="3")
    assert run.newest().job == "40_3"


@pytest.mark.parametrize(
    ("outcome", "code", "event"),
    [
        ({"outcome_name": "finished", "code": 0}, 0, "finish"),
        ({"outcome_name": "failed", "code": 90, "reason": "shard 3 changed", "rank": 1}, 90, "fail"),
    ],
)
def test_a_verdict_without_slurm(run, no_slurm, outcome, code, event):
    attempt = run.claim("17", host="n1", still_running=lambda job: False)
    attempt.write_outcome(**{"rank": 0, **outcome})
    done = endings("verdict", run.path, code, CLIPCLUSTER_ATTEMPT="1")
    assert done.returncode == code
    verdict = history.last_verdict(attempt)
    assert (verdict["event"], verdict["code"], verdict["job"]) == (event, code, "17")


def test_a_stale_verdict_writes_nothing(run, no_slurm):
    attempt = run.claim("17", host="n1", still_running=lambda job: False)
    run.claim("18", host="n2", still_running=lambda job: False)
    before = sorted(path.name for path in attempt.path.iterdir())
    assert endings("verdict", run.path, 85, CLIPCLUSTER_ATTEMPT="1").returncode == 88
    assert sorted(path.name for path in attempt.path.iterdir()) == before
    assert run.cancelled_jobs() == set()


def train_job(run, trainee, **environment):
    program = (
        f"from jobs.train import TrainJob; TrainJob({str(run.path)!r}, {trainee!r})(); print('returned')"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
    )


def test_the_job_never_returns(run):
    done = train_job(run, "trainee:train", TRAINEE=json.dumps({"steps": 2, "seconds": 0.01}))
    assert done.returncode == 0
    assert "finished at step 2" in done.stdout
    assert "returned" not in done.stdout
    broken = train_job(run, "trainee:no_such_function")
    assert broken.returncode != 1
    assert "returned" not in broken.stdout


def test_the_job_is_a_folder_and_a_name():
    import pickle

    job = pickle.loads(pickle.dumps(TrainJob("/runs/a")))
    assert vars(job) == {"run_dir": "/runs/a", "trainee": "clipcluster.run:train"}
