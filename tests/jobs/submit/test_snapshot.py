"""The copied code: complete, the same only once, and able to start."""

import json
import subprocess
import sys

import pytest

from clipcluster.errors import UserError
from jobs.submit import snapshot


def test_a_copy_of_what_is_imported(run):
    taken = snapshot.take(run.path)
    assert taken.name == "code-1"
    for name in ("clipcluster/runs/folder.py", "jobs/train.py", "tools/slurm.py"):
        assert (taken / name).read_bytes() == (snapshot._folder_of("jobs").parent / name).read_bytes()
    facts = json.loads((taken / "snapshot.json").read_text())
    assert facts["python"] == sys.executable
    assert len(facts["commit"]) == 40
    assert isinstance(facts["dirty"], bool)
    assert (taken / "git.diff").exists() or not facts["dirty"] or facts["untracked"]


def test_the_copy_runs_instead_of_the_checkout(run):
    code = snapshot.take(run.path)
    done = subprocess.run(
        [sys.executable, "-c", "import jobs.endings.act, clipcluster.runs.folder as f; print(f.__file__)"],
        cwd=code,
        env=snapshot.environment(code),
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(str(code))


def test_the_same_code_is_copied_once(run):
    assert snapshot.take(run.path) == snapshot.take(run.path)


def test_other_code_is_another_folder(run, tmp_path, monkeypatch):
    snapshot.take(run.path)
    copy = tmp_path / "checkout"
    subprocess.run(["cp", "-r", run.path / "code-1", copy], check=True)
    (copy / "jobs" / "train.py").open("a").write("# edited\n")
    monkeypatch.setattr(snapshot, "_folder_of", lambda package: copy / package)
    second = snapshot.take(run.path)
    assert second.name == "code-2"
    facts = json.loads((second / "snapshot.json").read_text())
    assert facts["commit"] is None  # no git checkout


@pytest.mark.parametrize("edit", ["import no_such_module\n", "import torch\n", "syntax error\n"])
def test_a_copy_that_cannot_start_is_refused(run, tmp_path, monkeypatch, edit):
    copy = tmp_path / "checkout"
    copy.mkdir()
    for package in snapshot.PACKAGES:
        subprocess.run(["cp", "-r", snapshot._folder_of(package), copy / package], check=True)
    train = copy / "jobs" / "train.py"
    train.write_text(train.read_text() + edit)
    monkeypatch.setattr(snapshot, "_folder_of", lambda package: copy / package)
    with pytest.raises(UserError, match="cannot start"):
        snapshot.take(run.path)
    assert list(run.path.glob("*code-*")) == []


def test_runs_may_lie_behind_a_link(run, tmp_path):
    (tmp_path / "link").symlink_to(run.path.parent)
    assert snapshot.take(tmp_path / "link" / run.name).name == "code-1"


def test_folders_that_a_person_made_are_left_alone(run):
    for name in ("code-old", "code-1-backup"):
        (run.path / name).mkdir()
    assert snapshot.take(run.path).name == "code-1"


def test_a_copy_that_was_edited_is_not_used_again(run):
    first = snapshot.take(run.path)
    (first / "jobs" / "train.py").open("a").write("# edited\n")
    assert snapshot.take(run.path).name == "code-2"
