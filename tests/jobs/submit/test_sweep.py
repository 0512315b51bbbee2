"""A sweep on this machine: members wait for their turn, are compared, cancelled and resumed as one."""

import json
import subprocess
import threading
import time

import pytest

from clipcluster.errors import UserError
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs.folder import Run
from clipcluster.runs.names import all_runs, run_name
from clipcluster.runs.sweeps import find_runs, join, members, run_of
from clipcluster.runtime.job_id import local_job_id
from jobs import api, compare, submissions
from jobs.cancel import cancel
from jobs.cli.app import command_for
from jobs.state import Queue, state_of
from jobs.submit.sweep import check_members
from jobs.submit.wanted import Wanted

PLAN = ["data.batch_size=128", "train.duration=15 epochs", "cluster.tasks_per_node=1"]


@pytest.fixture
def ask(recipe, tmp_path, monkeypatch, local, no_slurm):
    """Submits the demo's recipe as a sweep with the torch-free trainee; `ask.said` is what was said."""
    said = []

    def ask(*overrides, orders="{}", **more):
        monkeypatch.setenv("TRAINEE", orders)
        said.clear()
        given = {"trainee": "trainee:train", "quick": True, "runs": tmp_path / "runs", **more}
        return api.submit(recipe, [*PLAN, *overrides], say=said.append, **given)

    ask.said = said
    return ask


@pytest.mark.long
def test_members_take_turns_and_more_values_start_the_new_ones_alone(ask, local, tmp_path):
    alone = ask("optim.lr=2e-3", orders='{"steps": 3, "seconds": 0.01}')
    assert alone.wait(20) == "FINISHED"
    fast = {"orders": '{"steps": 5, "seconds": 0.02}'}
    done = ask("sweep.optim.lr=[1e-3, 2e-3]", "sweep.parallel=2", **fast)
    assert "digits: a sweep of 2 runs: 1 to start, 1 finished" in ask.said
    assert any(line.startswith("warm-up: ") for line in ask.said), "a submission says what the check does"
    assert alone.runs[0].path in [run.path for run in done.runs]  # what was trained alone is a member
    assert done.wait(20) == "FINISHED"
    more = ask("sweep.optim.lr=[1e-3, 2e-3, 3e-3]", "sweep.seed=[0]", **fast)
    assert "digits: a sweep of 3 runs: 1 to start, 2 finished" in ask.said
    assert more.wait(20) == "FINISHED"
    assert [len(run.attempts()) for run in more.runs] == [1, 1, 1]
    assert len(all_runs(tmp_path / "runs")) == 3
    again = api.submission("digits", runs=tmp_path / "runs")
    assert {run.name for run in again.runs} == {run.name for run in more.runs}
    assert {line["run"] for line in again.metrics()} == {run.name for run in more.runs}
    assert again.best("loss").state == "FINISHED"


def test_cancelled_as_one(ask, local):
    done = ask("sweep.seed=[0, 1, 2]", orders='{"steps": 400}')
    first, *others = done.runs
    local.until(lambda: first.newest())
    assert [state_of(run, Queue()).name for run in done.runs] == ["RUNNING", "PENDING", "PENDING"]
    done = ask("sweep.seed=[0, 1, 2, 3]")  # the new one waits for all of them
    assert done.jobs == {first.name: first.newest().job}
    done.cancel()
    assert done.wait(20) == "CANCELLED"
    for process in {*submissions.queues(others[0]), *submissions.queues(done.runs[3])}:
        local.until(lambda process=process: not submissions.local_job_runs(process))
    assert [len(run.attempts()) for run in done.runs] == [1, 0, 0, 0]


def test_folders_that_were_made_do_not_outlive_an_error(ask, tmp_path):
    ask("sweep.seed=[0, 1]", dry_run=True)
    second = [line.split(":")[0].strip() for line in ask.said if line.startswith("  digits-seed=1")]
    (tmp_path / "runs" / second[0] / "something else").mkdir(parents=True)
    with pytest.raises(FileExistsError):
        ask("sweep.seed=[0, 1]")
    assert all_runs(tmp_path / "runs") == []


def test_what_is_wrong_in_members_is_said_once(ask, recipe, tmp_path):
    with pytest.raises(UserError) as caught:
        ask("sweep.seed=[0, 1]", "sweep.optim.lr=[1e-3, high]")
    text = str(caught.value)
    assert text.count("got 'high'") == 1
    assert "(in seed=0+lr=high, seed=1+lr=high)" in text
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_members_and_writes_nothing(ask, tmp_path):
    ask("sweep.seed=[0, 1]", "sweep.optim.lr=[1e-3, 2e-3]", dry_run=True)
    named = [line for line in ask.said if line.startswith("  digits-")]
    assert len(named) == 4
    assert all("165 steps" in line for line in named)
    assert "would start them on this machine, 1 at a time" in ask.said
    assert any(line.startswith("warm-up: ") for line in ask.said)
    assert len(ask.said) == len(set(ask.said)), "nothing is said twice"
    assert sum("CPU, 1 rank" in line for line in ask.said) == 1
    assert not (tmp_path / "runs").exists()


def made(folder, name, values, lines):
    run = Run.create(folder / name, {}, {"name": "toy"})
    join(run, "toy", values)
    attempt = run.claim("1", host="here", still_running=lambda job: False)
    for line in lines:
        attempt.metrics(line)
    return run


def test_the_best_members_come_first(tmp_path):
    made(tmp_path, "toy-lr=10-00000000", {"lr": 10}, [{"step": 1, "loss": 3.0, "val/t2i_r1": 0.5}])
    made(tmp_path, "toy-lr=2-00000000", {"lr": 2}, [{"step": 1, "val/t2i_r1": 0.9}, {"step": 2, "loss": 2.0}])
    made(tmp_path, "toy-lr=3-00000000", {"lr": 3}, [{"step": 1, "loss": float("nan")}])
    made(tmp_path, "toy-more-lr=3-00000000", {"lr": 3}, [{"step": 1, "loss": 0.0}])
    join(Run(tmp_path / "toy-more-lr=3-00000000"), "toy-more", {})
    runs = members("toy", tmp_path)
    assert [run.name[4:8] for run in runs] == ["lr=2", "lr=3", "lr=1"]
    (tmp_path / "sweeps" / "toy").mkdir(parents=True)
    assert [run.name for run in find_runs("toy", tmp_path)] == [run.name for run in runs]
    assert [row.values["lr"] for row in compare.ranked(runs, "loss")] == [2, 10, 3]
    assert [row.values["lr"] for row in compare.ranked(runs, "val/t2i_r1")] == [2, 10, 3]
    assert compare.ranked(runs, "loss")[0].columns(["val/t2i_r1"]) == {
        "run": "toy-lr=2-00000000",
        "lr": 2,
        "step": 2,
        "val/t2i_r1": 0.9,
    }
    with pytest.raises(UserError, match="did you mean val/t2i_r1"):
        compare.ranked(runs, "val/t2i_r2")


def test_members_of_one_check_are_examined_once(recipe, monkeypatch):
    from clipcluster.recipe.load import load_sweep
    from jobs.submit.sweep import _examined

    overrides = [*PLAN, "sweep.seed=[0, 1]", "sweep.optim.lr=[1e-3, 2e-3]", "sweep.model.embed_dim=[32, 64]"]
    wanted = Wanted(recipe, overrides, say=lambda text: None)
    checked = check_members(wanted, load_sweep(recipe, overrides), "local")
    assert len(checked) == 8
    assert len({_examined(one) for one in checked}) == 2
    assert json.loads(_examined(checked[0]))[1] == 1


@pytest.fixture
def toys(tmp_path):
    """Two members of a sweep with a log each, of which one waits."""
    for number, loss in enumerate((2.0, 1.0)):
        values = {"seed": number}
        run = made(tmp_path, f"toy-seed={number}-00000000", values, [{"step": 1, "loss": loss}])
        (run.attempt(1).path / "rank-0.out").write_text(f"seed {number} says\n")
    (tmp_path / "sweeps" / "toy").mkdir(parents=True)
    return tmp_path


def test_the_verbs_take_a_sweep(toys, capsys, no_slurm):
    def verb(*words):
        command_for(words).main([*words, "--runs", str(toys)], standalone_mode=False)
        return capsys.readouterr().out

    by_loss = [line.split()[0] for line in verb("metrics", "toy", "--by", "loss").splitlines()]
    assert by_loss == ["run", "toy-seed=1-00000000", "toy-seed=0-00000000"]
    assert verb("metrics", "toy", "--csv").splitlines()[:2] == [
        "run,seed,step,loss",
        "toy-seed=0-00000000,0,1,2.0",
    ]
    assert json.loads(verb("metrics", "toy", "--jsonl", "--by", "loss").splitlines()[0])["seed"] == 1
    assert [one["name"] for one in json.loads(verb("status", "toy", "--json"))] == [
        "toy-seed=0-00000000",
        "toy-seed=1-00000000",
    ]
    assert verb("logs", "toy") == (
        "==> toy-seed=0-00000000 <==\nseed 0 says\n==> toy-seed=1-00000000 <==\nseed 1 says\n"
    )
    assert verb("logs", "toy-seed=1") == "seed 1 says\n"
    with pytest.raises(UserError, match=r"no run 'tooy'; did you mean toy\?.*sweeps and chains: toy\."):
        verb("status", "tooy")
    (members("toy", toys)[0].attempt(1).path / "rank-0.out").unlink()
    with pytest.raises(UserError) as caught:
        verb("logs", "toy", "--rank", "7")
    assert str(caught.value) == (
        "toy-seed=0-00000000 has printed nothing yet; see: clipcluster status toy-seed=0-00000000\n"
        "attempt 1 of toy-seed=1-00000000 has no rank 7; its ranks: 0 to 0"
    )
    assert verb("metrics", "toy", "--columns", "seed,loss").split()[:4] == ["run", "seed", "step", "loss"]
    with pytest.raises(UserError, match=r"--columns los: no member has it; did you mean loss\?"):
        verb("metrics", "toy", "--columns", "los")
    with pytest.raises(UserError, match="--plot is for one run"):
        verb("metrics", "toy", "--plot")
    with pytest.raises(UserError) as caught:
        verb("cancel", "toy")
    assert str(caught.value).count("is marked as cancelled") == 2


def test_logs_of_a_sweep_are_followed_until_all_have_ended(toys, capsys, no_slurm):
    first, second = members("toy", toys)

    def write():
        first.attempt(1).write_outcome(outcome_name="finished", code=0, rank=0)
        time.sleep(0.2)
        again = second.claim("1", host="here", still_running=lambda job: False)
        (again.path / "rank-0.out").write_text("seed 1 resumes\n")
        again.write_outcome(outcome_name="finished", code=0, rank=0)

    writer = threading.Thread(target=write)
    writer.start()
    words = ["logs", "toy", "-f", "--runs", str(toys)]
    command_for(words).main(words, standalone_mode=False)
    writer.join()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"==> {first.name} <==", "seed 0 says", f"==> {second.name} <==", *lines[3:]]
    assert lines[-1] == "seed 1 resumes"


def test_each_task_of_an_array_takes_its_run(run, tmp_path):
    from jobs.submit.script import of_runs

    other = Run.create(tmp_path / "runs" / "toy 1", {}, {})
    pairs = [(run, run.path / "code-1"), (other, other.path / "code 2")]
    lines = of_runs(
        Cluster(gpus_per_node=0),
        pairs,
        logs=tmp_path / "logs",
        lead=1,
        grace=30.0,
        used=lambda granted: granted,
    )
    begin = lines[: next(number for number, line in enumerate(lines) if line.startswith("cd "))]
    show = [
        'echo "$clipcluster_run|$clipcluster_code_folder|$clipcluster_marks|$CLIPCLUSTER_LOGS"',
        "trap - EXIT",
    ]
    for task, (member, code) in enumerate(pairs):
        given = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": str(task)}
        done = subprocess.run(
            ["bash", "-euc", "\n".join([*begin, *show])],
            env=given,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == f"{member.path}|{code}|{member.marks}|{tmp_path / 'logs'}"


def test_a_member_is_not_taken_for_one_that_differs_in_what_does_not_decide_the_weights(tmp_path):
    result = {"seed": 1}
    eight = Run.create(tmp_path / run_name("toy-workers=8", result), {}, {"name": "toy"})
    join(eight, "toy", {"data.workers": 8})
    others = {"toy": None, "toy-seed=1+workers=8": {"seed": 1, "data.workers": 8}}
    for title, values in others.items():
        assert run_of("toy", title, result, tmp_path, values).path == eight.path
    other = run_of("toy", "toy-workers=16", result, tmp_path, {"data.workers": 16})
    assert other.path == tmp_path / run_name("toy-workers=16", result)


def test_of_two_that_answer_a_wait_one_is_first(run):
    intent = submissions.intend(run, "local", "code-1", queue=local_job_id())
    assert submissions.settle(run, intent, taken="here")
    assert not submissions.settle(run, intent, refused="cancelled")
    intent = submissions.intend(run, "local", "code-1", queue=local_job_id())
    assert "before its turn came" in cancel(run, Queue())
    assert not submissions.settle(run, intent, taken="here")


def test_a_run_whose_turn_never_came_is_lost(run):
    with subprocess.Popen(["sleep", "60"]) as process:
        submissions.intend(run, "local", "code-1", queue=local_job_id(process.pid))
        assert state_of(run, Queue()).name == "PENDING"
        process.kill()
    assert state_of(run, Queue()).name == "LOST"


def test_what_waits_on_another_machine_is_not_started_here(run):
    intent = submissions.intend(run, "local", "code-1", queue="local-elsewhere-17-1")
    state = state_of(run, Queue())
    assert (state.name, state.queued) == ("UNKNOWN", False)
    assert intent.host in state.detail
    submissions.record(run, intent, refused="cancelled")
    assert str(state_of(run, Queue())) == "CANCELLED (before its turn came)"
