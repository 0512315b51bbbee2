"""What takes space in run folders, and what may go: never the last checkpoint that verifies."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from clipcluster.errors import UserError
from clipcluster.recipe.load import load, recipe_keys, settings_keys
from clipcluster.runs import evaluations, files
from clipcluster.runs.folder import Run
from jobs.endings import history
from jobs.space import named_by_others, prune, removable, used
from jobs.state import Queue
from tests.jobs.trainee import save
from tools.slurm import parse_queue

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits.yaml"
BEST = ["checkpoint.keep.best={metric: test/t2i_r1, count: 1}"]


class Nothing(Queue):
    """A queue without jobs, or with job 17."""

    def __init__(self, jobs=()):
        self.__dict__["_jobs"] = dict(jobs)

    def afterwards(self, job_id):
        return None


@pytest.fixture
def ended(tmp_path):
    """A failed run with checkpoints of steps 10 to 50, of which that of step 20 had the best result."""
    loaded = load(RECIPE, BEST, {"DIGITS": "/nowhere"})
    run = Run.create(tmp_path / "runs" / "digits-00000000", recipe_keys(loaded), settings_keys(loaded))
    attempt = run.claim("17", host="n1", still_running=lambda job: False)
    for step in (10, 20, 30, 40, 50):
        save(run, attempt, step, digest="")
        metrics = {"test/t2i_r1": 0.9 if step == 20 else 0.1 + step / 1000}
        files.write_json(run.checkpoints / f"step-{step:08d}" / "evaluation.json", {"metrics": metrics})
    attempt.event("fail", writer=history.WRITER, ending="failed", code=90, reason="disk full")
    return run


def steps(found):
    return [int(one.path.name[5:]) for one in found if one.path.name.startswith("step-")]


def test_old_checkpoints_go_and_the_best_and_the_newest_stay(ended):
    before = files.size_of(ended.path)
    told = used(ended, Nothing(), {})
    assert (told["bytes"], told["state"], told["checkpoints"]) == (before, "FAILED", 5)
    gone = list(prune(ended, Nothing()))
    assert steps(gone) == [10, 30, 40]
    assert sorted(path.name for path in ended.checkpoints.iterdir()) == ["step-00000020", "step-00000050"]
    assert before - files.size_of(ended.path) == sum(one.bytes for one in gone) == told["removable"]
    assert list(prune(ended, Nothing())) == []


def test_the_newest_that_verifies_stays_not_the_newest(ended):
    newest = ended.checkpoints / "step-00000050" / "state.json"
    newest.write_text(newest.read_text().replace("5", "6"))  # as long as before: only its hash differs
    assert steps(prune(ended, Nothing())) == [10, 30]
    assert (ended.checkpoints / "step-00000040").exists()
    assert newest.exists(), "a resume says why it sets it aside"


def test_where_no_checkpoint_verifies_nothing_goes(ended):
    for path in ended.checkpoints.glob("*/state.json"):
        path.write_text("{}")
    broken = ended.checkpoints / "broken-step-00000005-1"
    broken.mkdir()
    assert list(prune(ended, Nothing())) == []
    assert broken.exists()


def test_what_is_read_or_still_to_be_evaluated_stays(ended):
    (ended.checkpoints / "step-00000010" / "pinned-1a2b").touch()
    evaluations.owe(ended.newest(), 30)
    assert steps(prune(ended, Nothing())) == [40]


def test_what_another_run_starts_from_stays(ended):
    """By the name of the run and of its checkpoint: the folder of runs may have had another path then."""
    weights = f"/elsewhere/{ended.name}/checkpoints/step-00000030/model.safetensors"
    loaded = load(RECIPE, [f"model.image.weights={weights}"], {"DIGITS": "/nowhere"})
    keys = recipe_keys(loaded), settings_keys(loaded)
    Run.create(ended.path.parent / "other-00000000", *keys)
    assert named_by_others(ended.path.parent) == {ended.name: {30}}
    assert steps(prune(ended, Nothing())) == [10, 40]


def test_a_checkpoint_that_a_resume_would_not_take_is_not_the_newest(ended):
    """The run rolled back from steps after 35 and was cancelled before it had set step 40 and 50 aside."""
    for step in (10, 20, 30, 40, 50):
        folder = ended.checkpoints / f"step-{step:08d}"
        content = json.dumps({"step": step, "batches_drawn": step, "skipped": []}).encode()
        files.write_bytes(folder / "state.json", content)
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        files.write_json(folder / "manifest.json", {"files": {"state.json": entry}})
    files.write_json(ended.newest().path / "roll_back.json", {"skipped": [[35, 38]]})
    assert steps(prune(ended, Nothing())) == [10]
    assert (ended.checkpoints / "step-00000030").exists()
    (ended.newest().path / "roll_back.json").write_text("{}")
    with pytest.raises(UserError, match="roll_back"):
        list(prune(ended, Nothing()))


def test_leftovers_and_broken_ones_go(ended):
    for name in (".writing-step-00000060-1-1", ".deleting-step-00000001-1a2b", "broken-step-00000045-1"):
        (ended.checkpoints / name).mkdir()
        (ended.checkpoints / name / "model.safetensors").write_bytes(b"x" * 1000)
    names = {one.path.name for one in prune(ended, Nothing()) if not one.path.name.startswith("step-")}
    assert names == {".writing-step-00000060-1-1", ".deleting-step-00000001-1a2b", "broken-step-00000045-1"}
    assert not [path for path in ended.checkpoints.iterdir() if not path.name.startswith("step-")]


def test_nothing_of_a_run_with_a_job_goes(ended):
    ended.claim("18", host="n1", still_running=lambda job: False)  # no verdict: SLURM does not know its job
    silent = Nothing()
    silent.__dict__["_jobs"] = None
    with pytest.raises(UserError, match="UNKNOWN"):
        list(prune(ended, silent))
    ended.newest().event("requeue", writer=history.WRITER, ending="preempted", code=85)
    (job,) = parse_queue("18|PENDING|low|me|0:00|1:00|N/A||BeginTime|digits\x1f")
    waiting = Nothing({"18": job})
    with pytest.raises(UserError, match="PENDING"):
        list(prune(ended, waiting))
    assert used(ended, waiting, {})["removable"] == 0
    assert len(list(ended.checkpoints.iterdir())) == 5
    assert steps(removable(ended, lambda checkpoint: True, {})) == [10, 30, 40]


@pytest.mark.long
def test_as_people_type_it(ended):
    def clipcluster(*words):
        command = [sys.executable, "-m", "jobs.cli", "runs", *words, "--runs", str(ended.path.parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RECIPE.parents[1])
        return done.stdout

    (told,) = json.loads(clipcluster("du", "--json"))
    assert told["removable"] == used(ended, Nothing(), {})["removable"] > 0
    assert "would remove" in clipcluster("prune")
    assert len(list(ended.checkpoints.iterdir())) == 5
    said = clipcluster("prune", "--yes", ended.name).splitlines()
    assert [line.split()[0] for line in said[:-1]] == ["removed"] * 3
    assert said[-1].endswith("freed")
    assert len(list(ended.checkpoints.iterdir())) == 2
    assert "0 bytes may go" in clipcluster("du")
