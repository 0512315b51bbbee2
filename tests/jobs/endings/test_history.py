"""What earlier endings left behind, and what counts against a run."""

import json

import pytest

from clipcluster.runs.checkpoints import newest_complete
from jobs.endings import history
from jobs.endings.act import blamed_twice, claim
from jobs.endings.facts import gather
from jobs.endings.log import tail
from tools.slurm import Slurm


def attempt_with(run, verdict=None, *, job="17", checkpoint=None, counts=True, **fields):
    attempt = run.claim(job, host="n1", still_running=lambda job: False)
    if verdict:
        attempt.event(
            "requeue",
            writer=history.WRITER,
            **{"ending": verdict, "counts": counts, "checkpoint": checkpoint, **fields},
        )
    return attempt


def make_checkpoint(run, step, content=b"state"):
    folder = run.checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps({"files": {"state.json": {"bytes": 5, "sha256": "…"}}}))
    return folder


def test_only_whole_checkpoints_count(run):
    assert newest_complete(run.checkpoints) is None
    make_checkpoint(run, 5)
    make_checkpoint(run, 10, b"sta")
    (make_checkpoint(run, 15) / "manifest.json").unlink()
    (make_checkpoint(run, 20) / "manifest.json").write_text("{}")
    (make_checkpoint(run, 25) / "state.json").unlink()
    (run.checkpoints / "broken-step-00000030-1").mkdir()
    assert newest_complete(run.checkpoints) == 5


def seen(run, attempt):
    return gather(run, attempt, 1, job_id=attempt.job, logs=run.submitit)


def test_a_row_without_a_newer_checkpoint(run):
    attempt_with(run, "crashed")
    attempt_with(run, "preempted", counts=False)
    attempt_with(run, "out of time")
    last = attempt_with(run)
    assert seen(run, last).fruitless == 2
    make_checkpoint(run, 5)
    assert seen(run, last).fruitless == 0


def test_a_newer_checkpoint_begins_a_new_row(run):
    attempt_with(run, "crashed", checkpoint=5)
    attempt_with(run, "crashed", checkpoint=10)
    last = attempt_with(run)
    make_checkpoint(run, 10)
    assert seen(run, last).fruitless == 1
    make_checkpoint(run, 11)
    assert seen(run, last).fruitless == 0


@pytest.mark.parametrize("between", [{"job": "18"}, {"counts": False}])
def test_another_job_or_an_agreed_stop_begins_a_new_row(run, between):
    attempt_with(run, "crashed")
    attempt_with(run, "stopped", **between)
    assert seen(run, attempt_with(run)).fruitless <= 1
    assert seen(run, attempt_with(run, job="99")).fruitless == 0


def test_a_broken_environment_just_before(run):
    attempt_with(run, "never started")
    attempt_with(run, "preempted", counts=False)
    assert seen(run, attempt_with(run)).broken_before
    attempt_with(run, "crashed")
    assert not seen(run, attempt_with(run)).broken_before


def test_what_was_raised_just_before(run):
    shape = {"step": 7, "signature": "RuntimeError: shapes"}
    make_checkpoint(run, 5)
    attempt_with(run, "crashed", checkpoint=5, raised=[shape])
    attempt_with(run, "preempted", checkpoint=5, counts=False)
    last = attempt_with(run)
    assert seen(run, last).raised_before == [shape]
    assert seen(run, attempt_with(run, job="18")).raised_before == []
    attempt_with(run, "crashed", checkpoint=5)
    assert seen(run, attempt_with(run)).raised_before == []
    make_checkpoint(run, 6)
    assert seen(run, last).raised_before == []


def test_a_node_blamed_twice(run):
    attempt_with(run, "crashed", blamed="n2")
    last = attempt_with(run)
    assert blamed_twice(run, last, "n3") == []
    assert blamed_twice(run, last, "n2") == ["n2"]


def test_an_unknown_job_counts_as_running_until_it_ended(run, no_slurm, monkeypatch):
    monkeypatch.setattr(history, "ASK_SECONDS", "no waiting where there is no SLURM")
    attempt = attempt_with(run)
    assert history.job_runs(run, "17", Slurm())
    attempt.event("fail", writer=history.WRITER)
    assert not history.job_runs(run, "17", Slurm())
    attempt_with(run, job="local-elsewhere-12-34")
    assert history.job_runs(run, "local-elsewhere-12-34", Slurm())
    run.mark_cancelled(["local-elsewhere-12-34"])
    assert not history.job_runs(run, "local-elsewhere-12-34", Slurm())


@pytest.mark.parametrize(("silent", "runs"), [(2, False), (99, True)])
def test_a_silent_slurm_is_asked_again_about_another_job(run, programs, monkeypatch, silent, runs):
    """Its controller is restarted while a job starts."""
    monkeypatch.setattr(history, "ASK_SECONDS", 0.01)
    monkeypatch.setattr(history, "SILENT_SECONDS", 1.0)
    asked = run.path / "asked"
    programs(
        scontrol=f"echo >> {asked}\n[ $(wc -l < {asked}) -gt {silent} ] ||"
        " { echo 'Unable to contact slurm controller' >&2; exit 1; }\necho JobId=17 JobState=COMPLETED"
    )
    attempt_with(run)
    assert history.job_runs(run, "17", Slurm()) == runs
    assert len(asked.read_text().splitlines()) > 2
    asked.unlink()
    run.mark_cancelled(["17"])
    assert not history.job_runs(run, "17", Slurm())
    assert len(asked.read_text().splitlines()) == 1  # that it was cancelled stands in the run's folder


def test_what_was_started_by_hand_elsewhere_ended_with_its_outcome(run):
    attempt = attempt_with(run, job="local-elsewhere-12-34")
    assert history.job_runs(run, "local-elsewhere-12-34", Slurm())
    attempt.write_outcome(outcome_name="stopped", code=85, rank=0)
    assert claim(run, "17", Slurm()).number == 2


def test_nothing_is_claimed_for_a_finished_or_cancelled_run(run, no_slurm, capsys):
    run.mark_cancelled(["17"])
    assert claim(run, "17", Slurm()) is None
    attempt = claim(run, "18", Slurm())
    attempt.write_outcome(outcome_name="finished", code=0, rank=0)
    assert claim(run, "18", Slurm()) is None
    assert capsys.readouterr().out == ""


def test_the_tail_begins_at_the_attempt(tmp_path):
    log = tmp_path / "log"
    log.write_text("attempt 1 of run begins\nold\nattempt 2 of run begins (job 7)\nnew\n\nlast\n")
    assert tail([log], after="attempt 2 of run begins") == "new\nlast"
    assert tail([log], after="attempt 3 of run begins", lines=1) == "last"
    assert tail([tmp_path / "absent"]) == ""
