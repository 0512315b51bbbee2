"""From a recipe to a running job, twice is once, and what is refused leaves nothing behind."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clipcluster.errors import UserError
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs.checkpoints import newest_complete
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics
from clipcluster.runs.names import all_runs
from clipcluster.runtime.accelerators import count_accelerators
from jobs.cancel import cancel
from jobs.state import Queue, state_of
from jobs.submissions import job_ids, submissions
from jobs.submit import executor, launch
from jobs.submit import submit as submission
from jobs.submit.submit import LOCK, Wanted, submit

PLAN = ["data.batch_size=128", "train.duration=15 epochs", "optim.lr=1e-3", "cluster.tasks_per_node=2"]

ROOT = Path(__file__).resolve().parents[3]
AT_ONCE = """
import sys
from pathlib import Path
from clipcluster.errors import UserError
from jobs.submit.submit import Wanted, submit

recipe, runs, *overrides = sys.argv[1:]
try:
    submit(Wanted(Path(recipe), overrides, Path(runs), trainee="trainee:train", quick=True))
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.fixture
def ask(recipe, tmp_path, monkeypatch, local, no_slurm):
    """Submits the demo's recipe with the torch-free trainee; `ask.said` is what was said."""
    said = []

    def ask(*overrides, orders="{}", **more):
        monkeypatch.setenv("TRAINEE", orders)
        said.clear()
        wanted = Wanted(
            recipe=recipe,
            overrides=[*PLAN, *overrides],
            trainee="trainee:train",
            **{"runs": tmp_path / "runs", "quick": True, "say": said.append, **more},
        )
        submitted = submit(wanted)
        if submitted.job:
            local.jobs.append(submitted.job)
        return submitted

    ask.said = said
    return ask


def test_a_new_run(ask, local):
    submitted = ask(orders='{"steps": 4, "seconds": 0.02}')
    run = submitted.run
    assert ask.said[0] == "no sbatch on the PATH: the run goes to this machine (--executor local)"
    assert local.end(run).name == "FINISHED"
    settings = run.settings()
    assert settings["plan"]["total_steps"] == 165
    assert settings["executor"] == "local"
    assert settings["code"] == "code-1"
    assert (run.path / "code-1" / "clipcluster" / "errors.py").is_file()
    assert Path(settings["paths"]["data.train.0.shards"]).is_absolute()
    assert "${DIGITS" in run.recipe()["data"]["train"][0]["shards"]
    assert [line["job"] for line in submissions(run)] == [submitted.job] == job_ids(run)


def test_twice_is_once(ask, local):
    first = ask(orders='{"steps": 400}')
    again = ask()
    assert again.run.path == first.run.path
    assert again.job == first.job
    assert ask.said[-1] == f"{first.run.name} is RUNNING, as job {first.job}"
    assert len(submissions(first.run)) == 1
    os.kill(local.pid(), signal.SIGTERM)
    assert local.end(first.run).name == "STOPPED"
    third = ask(orders='{"steps": 400}')
    assert any("resumes from its last checkpoint" in line for line in ask.said)
    assert third.job != first.job
    local.at_step(first.run, 6, attempt=2)
    os.kill(local.pid(), signal.SIGTERM)
    local.end(first.run)


def test_of_several_at_once_one_submits(recipe, tmp_path, local, no_slurm, monkeypatch):
    monkeypatch.setenv("TRAINEE", '{"steps": 200}')
    words = [sys.executable, "-c", AT_ONCE, str(recipe), str(tmp_path / "runs"), *PLAN]
    several = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        for _ in range(3)
    ]
    said = [process.communicate()[0] for process in several]
    (run,) = all_runs(tmp_path / "runs")
    local.jobs.extend(job_ids(run))
    assert len(submissions(run)) == 1, said
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [LOCK, run.name]
    for process, words_said in zip(several, said, strict=True):
        assert process.returncode in (0, 2), words_said
        assert "Traceback" not in words_said
    cancel(run, Queue())
    local.end(run)


def test_a_finished_run_says_so(ask, local):
    run = ask(orders='{"steps": 2, "seconds": 0.01}').run
    local.end(run)
    again = ask()
    assert again.job is None
    assert "is finished" in ask.said[-1]
    assert len(run.attempts()) == 1


def test_other_settings_go_on_other_results_are_another_run(ask, local):
    run = ask(orders='{"steps": 400}').run
    cancel(run, Queue())
    local.end(run)
    changed = ask("data.workers=0", "checkpoint.every=1 epochs", orders='{"steps": 2}').run
    assert changed.path == run.path
    assert run.settings()["data"]["workers"] == 0
    assert local.end(run).name == "FINISHED"
    assert run.attempt(1).settings()["data"]["workers"] == 1
    other = ask("optim.lr=2e-3", dry_run=True)
    assert other.run.path != run.path
    assert any(f"{run.name} differs in optim.lr (0.001 there, 0.002 here)" in line for line in ask.said)


@pytest.mark.long
def test_a_run_that_was_moved_and_its_copy_both_resume(ask, local, tmp_path):
    """Each from the checkpoint that was there, by the recipe alone; neither touches the other."""
    run = ask(orders='{"steps": 400, "seconds": 0.05}').run
    local.at_step(run, 6)
    os.kill(local.pid(), signal.SIGTERM)
    assert local.end(run).name == "STOPPED"
    reached = newest_complete(run.checkpoints)
    moved, copied = tmp_path / "moved", tmp_path / "copied"
    moved.mkdir()
    run.path.rename(moved / run.name)
    shutil.copytree(moved, copied)
    for place in (moved, copied):
        again = ask(runs=place, orders=json.dumps({"steps": reached + 2, "seconds": 0.05})).run
        assert again.path == place / run.name
        assert local.end(again).name == "FINISHED"
        assert newest_complete(again.checkpoints) == reached + 2
        steps = [line["step"] for line in merged_metrics(again)]
        assert steps == list(range(1, reached + 3))
        assert len(again.attempts()) == 2
    assert not run.exists()


def test_at_once_after_a_cancel_it_refuses(ask, local):
    run = ask(orders='{"steps": 400, "save_seconds": 1}').run
    local.at_step(run, 2)
    cancel(run, Queue())
    with pytest.raises(UserError, match="is still ending"):
        ask()
    local.end(run)
    assert ask(orders='{"steps": 3, "seconds": 0.01}').job
    assert local.end(run).name == "FINISHED"


def test_a_dry_run_writes_nothing(ask, tmp_path):
    submitted = ask(dry_run=True)
    assert submitted.job is None
    assert any("165 in total" in line for line in ask.said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "more", "message"),
    [
        (["data.batchsize=1"], {}, "did you mean"),
        (["data.batch_size=129"], {}, "does not divide by 2 ranks"),
        (["data.train.0.shards=/nowhere"], {}, "/nowhere"),
        ([], {"executor": "slurm"}, "no sbatch on the PATH"),
        ([], {"site": "atlantis"}, "atlantis"),
    ],
)
def test_what_is_wrong_leaves_nothing(ask, tmp_path, overrides, more, message):
    with pytest.raises(UserError, match=message):
        ask(*overrides, **more)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_folder_that_submitit_would_not_find_again_is_refused(ask, tmp_path, dry_run):
    """submitit puts the job's id for %j, everywhere in the path."""
    with pytest.raises(UserError, match=r"50%job.*%j stands for"):
        ask(runs=tmp_path / "50%job", dry_run=dry_run)
    assert not (tmp_path / "50%job").exists()
    assert ask(runs=tmp_path / "50% of all", dry_run=True).job is None


def test_a_silent_cluster_is_no_reason_to_train_on_its_login_node(ask, tmp_path):
    for program in ("sbatch", "scontrol"):
        script = tmp_path / "bin" / program
        script.write_text("#!/bin/sh\necho 'slurm_load_ctl_conf error: Connection refused' >&2; exit 1\n")
        script.chmod(0o755)
    for asked in (None, "slurm"):
        with pytest.raises(UserError, match=r"SLURM does not answer .*Connection refused.*--executor local"):
            ask(executor=asked)
    ask(executor="local", dry_run=True)
    assert ask.said[-1] == "would start 2 ranks on this machine, for 15 min at most"
    script.write_text("#!/bin/sh\necho 'fatal: Could not establish a configuration source' >&2; exit 1\n")
    ask(executor=None, dry_run=True, quick=False)
    assert ask.said[0] == "sbatch is here but no cluster: the run goes to this machine (--executor local)"
    assert any(line.startswith("  not checked") and "(clipcluster check --deep" in line for line in ask.said)
    assert executor.likely() == "local"
    with pytest.raises(UserError, match="sbatch is here but no cluster"):
        ask(executor="slurm", dry_run=True)


def test_a_dry_run_says_the_flags_of_the_job(ask, tmp_path):
    for program in ("sbatch", "scontrol"):
        script = tmp_path / "bin" / program
        script.write_text("#!/bin/sh\n")
        script.chmod(0o755)
    ask("cluster.nodes=2", "cluster.mem=4 GB", "data.batch_size=128", dry_run=True)
    flags = ask.said[ask.said.index("would submit to SLURM:") + 1 :]
    assert {"  nodes: 2", "  mem: 4096M", "  requeue: True", "  ntasks-per-node: 2"} <= set(flags)
    assert not any("setup" in line or "{" in line for line in flags)


def test_a_broken_snapshot_never_starts(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "submitit.py").write_text("raise ImportError('no submitit here')\n")
    with pytest.raises(UserError, match="no submitit here"):
        ask()
    assert all_runs(tmp_path / "runs") == []


def test_one_node_here_whatever_the_cluster_has(ask):
    ask("cluster.nodes=2-4", "cluster.tasks_per_node=2", dry_run=True)
    assert "this machine is one node: cluster.nodes=1 instead of 2-4" in ask.said
    assert any("= 2 ranks x 64 on 1 node" in line for line in ask.said)


def test_new_code_is_said(ask, local):
    run = ask(orders='{"steps": 400}').run
    cancel(run, Queue())
    local.end(run)
    with (run.path / "code-1" / "jobs" / "train.py").open("a") as stream:
        stream.write("# older\n")
    run.settings_file.unlink()  # every submission writes them again
    ask(orders='{"steps": 2, "seconds": 0.01}')
    assert any("code-2" in line for line in ask.said)
    assert yaml.safe_load(run.settings_file.read_text())["code"] == "code-2"
    assert local.end(run).name == "FINISHED"


def test_the_folder_alone(ask):
    submitted = ask(executor="none")
    assert submitted.job is None
    assert any("torchrun --nproc-per-node=2" in line for line in ask.said)
    assert state_of(submitted.run, Queue()).name == "NEW"
    assert submitted.run.settings()["executor"] == "none"


def test_states_without_a_job(run):
    assert state_of(run, Queue()).name == "NEW"
    assert Run(run.path).exists()


SLOW = """
import sys, time
if "jobs.endings" in sys.orig_argv:
    time.sleep(2)
"""


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """Local runs take two seconds to begin, as on a slow file system; a submission waits half a second."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "slow"), os.environ["PYTHONPATH"]]))
    monkeypatch.setattr(launch, "START_SECONDS", 0.5)


def test_a_run_that_is_slow_to_begin_keeps_its_folder(ask, local, slow):
    submitted = ask(orders='{"steps": 2, "seconds": 0.01}')
    assert any("has not claimed the run within 0.5 s" in line for line in ask.said)
    assert state_of(submitted.run, Queue()).name == "RUNNING"
    assert ask().job == submitted.job
    assert local.end(submitted.run).name == "FINISHED"
    assert len(submitted.run.attempts()) == 1


def test_a_launch_that_is_interrupted_keeps_its_folder(ask, local, slow, monkeypatch):
    def interrupted(*arguments, **more):
        jobs.append(start(*arguments, **more))
        raise KeyboardInterrupt

    jobs, start = [], launch.locally
    monkeypatch.setattr(launch, "locally", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(orders='{"steps": 20}')
    monkeypatch.setattr(launch, "locally", start)
    local.jobs.extend(jobs)
    with pytest.raises(UserError, match=r"an earlier submission was interrupted \(SUBMITTING"):
        ask()
    run = ask(follow=True).run
    assert job_ids(run) == jobs
    assert submissions(run) == []
    assert local.end(run).name == "FINISHED"


HOLD = """
import sys
from filelock import FileLock

with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_submission_that_is_killed_releases_the_lock(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "LOCK_SECONDS", 0.1)
    (tmp_path / "runs").mkdir()
    words = [sys.executable, "-c", HOLD, str(tmp_path / "runs" / LOCK)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another submission"):
            ask(executor="none")
        holder.kill()
    assert ask(executor="none").run.exists()


def test_a_file_system_without_locks_is_said(ask, monkeypatch):
    def without_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    assert ask(executor="none").run.exists()
    assert any("without locks" in line for line in ask.said)


def test_pickles_belong_to_their_owner(ask, local):
    before = os.umask(0)
    try:
        run = ask(orders='{"steps": 2, "seconds": 0.01}').run
    finally:
        os.umask(before)
    local.end(run)
    modes = {path.name: path.stat().st_mode & 0o777 for path in run.submitit.glob("*.pkl")}
    assert len(modes) == 2
    assert set(modes.values()) == {0o600}
    assert run.submitit.stat().st_mode & 0o022 == 0


def test_the_device_is_said(ask, tmp_path):
    ask(dry_run=True)
    assert "  device          CPU, 2 ranks per node (cluster.gpus_per_node is 0)" in ask.said
    ask("cluster.tasks_per_node=1", "cluster.nodes=2", executor="none", dry_run=True)
    assert "  device          CPU, 1 rank per node (cluster.gpus_per_node is 0)" in ask.said


@pytest.mark.skipif(count_accelerators() > 0, reason="this machine has a GPU")
def test_gpus_that_were_requested_and_are_not_here_are_refused(ask, tmp_path):
    with pytest.raises(UserError, match=r"gpus_per_node: 2 requested, and this machine has none"):
        ask("cluster.gpus_per_node=2", "cluster.tasks_per_node=2")
    assert not (tmp_path / "runs").exists()
    assert executor.missing_devices(Cluster()) == ""
    assert executor.devices(Cluster(), "local") == "device: CPU, 1 rank (this machine has no GPU)"


def test_gpus_of_a_cluster_are_said():
    asked = Cluster(gpus_per_node=2)
    assert executor.devices(asked, "slurm") == (
        "device: 2 GPUs per node, requested from SLURM, for 2 ranks per node"
    )
