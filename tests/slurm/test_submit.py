"""Submitting on a real cluster: a recipe twice, after a cancel, and while the old job is still ending."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clipcluster.errors import UserError
from clipcluster.runs.names import all_runs
from jobs.cancel import cancel
from jobs.state import Queue, state_of
from jobs.submissions import job_ids, submissions
from jobs.submit.submit import Wanted, submit
from tools.convert.convert import convert

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits.yaml"


@pytest.fixture
def ask(bench, tmp_path, monkeypatch):
    """Submits the demo's recipe to the sandbox with the torch-free trainee; `ask.said` is what was said."""
    convert("digits", tmp_path / "digits")
    monkeypatch.setenv("DIGITS", str(tmp_path / "digits"))
    said = []

    def overrides(orders):
        return [
            "cluster.partition=low",
            "cluster.tasks_per_node=2",
            "data.batch_size=128",
            f"cluster.environment.TRAINEE='{json.dumps(orders)}'",
        ]

    def ask(orders, **more):
        said.clear()
        wanted = Wanted(
            recipe=RECIPE,
            overrides=overrides(orders),
            runs=tmp_path / "runs",
            trainee="trainee:train",
            quick=True,
            say=said.append,
            **more,
        )
        submitted = submit(wanted)
        if submitted.job:
            bench.jobs.append(submitted.job)
        return submitted

    ask.said, ask.overrides = said, overrides
    return ask


def test_twice_after_a_cancel_and_to_the_end(ask, bench):
    first = ask({"steps": 400, "save_seconds": 2})
    assert first.run.settings()["executor"] == "slurm"
    assert first.run.settings()["cluster"]["grace"] == "5 s"  # KillWait, less than GraceTime
    again = ask({"steps": 400})
    assert again.job == first.job
    assert f"as job {first.job}" in ask.said[-1]
    bench.at_step(first.run, 3)
    assert state_of(first.run, Queue()).name == "RUNNING"

    cancel(first.run, Queue())
    with pytest.raises(UserError, match="still ending"):
        ask({"steps": 400})
    second = ask({"steps": 400}, follow=True)  # waits for the old job
    assert second.job != first.job
    assert bench.slurm.job(first.job).state == "CANCELLED"

    bench.at_step(second.run, 8, attempt=2)
    cancel(second.run, Queue())
    bench.gone(second.job)
    assert state_of(second.run, Queue()).name == "CANCELLED"
    third = ask({"steps": 12, "seconds": 0.02})
    bench.until(lambda: state_of(third.run, Queue()).name == "FINISHED")
    assert bench.gone(third.job) == "COMPLETED"
    assert ask({}).job is None
    assert "is finished" in ask.said[-1]


def test_what_slurm_would_refuse_is_said_once_and_leaves_nothing(ask, tmp_path, capfd):
    with pytest.raises(UserError, match="there is no partition 'nowhere'; there are high, low"):
        submit(
            Wanted(
                recipe=RECIPE,
                overrides=["cluster.partition=nowhere"],
                runs=tmp_path / "runs",
                quick=True,
                say=lambda text: None,
            )
        )
    assert all_runs(tmp_path / "runs") == []
    assert capfd.readouterr().err == ""


SUBMIT = """
import json, sys
from pathlib import Path
from jobs.submit.submit import Wanted, submit

recipe, runs, *overrides = sys.argv[1:]
submit(Wanted(Path(recipe), overrides, Path(runs), trainee="trainee:train", quick=True))
"""


@pytest.fixture
def slow_sbatch(tmp_path, monkeypatch):
    """Puts a wrapper in front of sbatch: `body` has {sbatch}; it makes the file `said` when it is reached."""
    real = shutil.which("sbatch")

    def wrap(body):
        (tmp_path / "bin").mkdir()
        program = tmp_path / "bin" / "sbatch"
        asks = f'[[ "$*" != *--test-only* ]] || exec {real} "$@"\n'  # when a job would start
        program.write_text("#!/bin/bash\n" + asks + body.format(sbatch=real, mark=tmp_path / "reached"))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", os.pathsep.join([str(program.parent), os.environ["PATH"]]))
        return tmp_path / "reached"

    return wrap


@pytest.mark.parametrize(
    ("body", "end"),
    [
        ('touch {mark}; sleep 2; exec {sbatch} "$@"\n', signal.SIGKILL),  # dies before sbatch asks SLURM
        ('out=$({sbatch} "$@"); touch {mark}; sleep 2; echo "$out"\n', signal.SIGKILL),  # … after
        ('out=$({sbatch} "$@"); touch {mark}; sleep 2; echo "$out"\n', signal.SIGINT),
    ],
    ids=["killed before", "killed after", "interrupted after"],
)
def test_a_job_whose_submitter_died_is_found_again(ask, bench, tmp_path, slow_sbatch, body, end):
    mark = slow_sbatch(body)
    overrides = ask.overrides({"steps": 6, "seconds": 0.1})
    words = [sys.executable, "-c", SUBMIT, str(RECIPE), str(tmp_path / "runs"), *overrides]
    submitter = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    bench.until(mark.exists)
    os.kill(submitter.pid, end)
    submitter.wait()
    (run,) = all_runs(tmp_path / "runs")
    assert run.exists()
    mark.unlink()
    again = ask({"steps": 6, "seconds": 0.1}, follow=True)
    assert again.run.path == run.path
    bench.until(lambda: state_of(run, Queue()).name == "FINISHED")
    assert len(job_ids(run)) == 1
    # a job that had claimed the run by then needs no line
    assert [line["job"] for line in submissions(run)] in (job_ids(run), [])
    assert len(run.attempts()) == 1
