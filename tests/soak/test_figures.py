"""The figures of a soak: what they show to be wrong is said, and nothing else."""

import pytest

from clipcluster.runs.folder import Run
from jobs.accounting import KINDS, Account
from tests.soak import figures


def attempt(run, job, *steps, ending):
    """An attempt at the run that logged these steps, with its outcome and verdict."""
    claimed = run.claim(job, host="here", still_running=lambda other: False)
    for step in steps:
        claimed.metrics({"step": step})
    claimed.write_outcome(outcome_name="stopped", code=85, rank=0, step=max(steps))
    claimed.event("requeue", writer="verdict", ending=ending)
    return claimed


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "toy", {"name": "toy"}, {})


def account(number, *, lost_steps=0, **spent):
    return Account(
        number, "1", 2, 0.0, 1.0, "preempted", "", 0, 9, {**dict.fromkeys(KINDS, 0.0), **spent}, lost_steps
    )


def test_a_saved_step_that_was_lost_and_a_sum_that_is_off_are_problems(run):
    attempt(run, "1", 1, 2, ending="preempted")
    good = figures.Story(run, [account(1, train=99.5, queue=50)], 100.0)
    assert figures.problems([good]) == []
    assert "98.0 s" in figures.problems([figures.Story(run, [account(1, train=98)], 100.0)])[0]
    lost = figures.Story(run, [account(1, train=100, lost_steps=3)], 100.0)
    assert "3 of its steps were lost" in figures.problems([lost])[0]


def test_the_way_back_is_counted_within_one_job(run):
    for job in ("1", "1", "2"):
        attempt(run, job, 1, ending="preempted")
    (back,) = figures.returns(run)
    assert 0 <= back.waited < 1
    assert 0 <= back.started < 1


def test_the_table_names_every_cause(run):
    attempt(run, "1", 1, 2, ending="preempted")
    run.claim("1", host="here", still_running=lambda other: False)
    accounts = [account(1, train=60), account(2, train=60, lost=80, lost_steps=7)]
    lines = figures.table([figures.Story(run, accounts, 200.0)], 101.0, [2.0, 4.0])
    assert any(line.split() == ["preempted", "1", "0", "0.0"] for line in lines)
    assert any(line.split() == ["preempted,", "unsaved", "1", "7", "80.0"] for line in lines)
    assert "goodput 60.0% of 400 allocated rank-seconds" in lines
    assert all(
        any(name in line for line in lines)
        for kind, name in KINDS.items()
        if kind not in ("queue", "requeue")
    )
