"""Submitting from Python and chains on this machine: one plan, one after the other, cancelled as one."""

from pathlib import Path

import numpy
import pytest

import clipcluster
from clipcluster.errors import UserError
from clipcluster.recipe.load import load_chain
from clipcluster.recipe.sections.chain import Chain, Export, Measure
from clipcluster.runs import chains, files
from clipcluster.runs.folder import Run
from jobs import api, submissions
from jobs import convert as array
from jobs.cli.app import command_for
from jobs.conversions import Conversion
from jobs.endings.act import claim
from jobs.submit.follow_up import order_of, submit_step
from tools.slurm import Slurm

PLAN = ["data.batch_size=128", "train.duration=15 epochs", "cluster.tasks_per_node=1"]


@pytest.fixture
def chain(recipe, tmp_path, monkeypatch, local, no_slurm):
    """A recipe that starts from another run, by the torch-free trainee; `chain.said` is what was said."""
    said = []
    (tmp_path / "before.yaml").write_text(f"extends: {recipe}\nname: before\n")
    (tmp_path / "main.yaml").write_text(
        f"extends: {recipe}\nname: main\n"
        "first: [{recipe: before.yaml, overrides: [train.duration=2 epochs], gives: [model.image.weights]}]\n"
    )

    def submit(*overrides, orders="{}", **more):
        monkeypatch.setenv("TRAINEE", orders)
        said.clear()
        given = {"trainee": "trainee:train", "quick": True, "runs": tmp_path / "runs", **more}
        return api.submit(tmp_path / "main.yaml", [*PLAN, *overrides], say=said.append, **given)

    submit.said = said
    return submit


@pytest.mark.long
def test_what_follows_a_failure_says_so(chain, local):
    done = chain(orders='{"steps": 9, "seconds": 0.05, "raises": {"step": 2, "error": "DataError"}}')
    assert done.wait(20) == "CANCELLED"
    (state,) = done.states()
    assert state.detail == f"what comes first did not finish: {done.first[0].name} is FAILED"
    again = chain(orders='{"steps": 4, "seconds": 0.02}')
    assert again.wait(20) == "FINISHED"


@pytest.mark.long
def test_a_run_starts_once_the_one_before_has_finished(chain, tmp_path):
    done = chain(orders='{"steps": 40, "seconds": 0.1}')
    (first,) = done.first
    assert done.path.name.startswith("main-")
    assert (first.state, done.state) == ("RUNNING", "PENDING")
    assert done.runs[0].settings()["paths"]["model.image.weights"] == str(first.path)
    assert done.wait(30) == "FINISHED"
    begun = done.runs[0].attempt(1).claim()["time"]
    ended = first.runs[0].attempt(1).outcome()["time"]
    assert begun > ended
    again = chain()
    assert (again.jobs, again.state) == ({}, "FINISHED")
    assert [len(run.attempts()) for run in api.submission("main", runs=tmp_path / "runs").runs] == [1, 1]


@pytest.mark.long
def test_cancelled_as_one(chain, local):
    done = chain(orders='{"steps": 400}')
    first = done.first[0].runs[0]
    local.until(first.newest)
    done.cancel()
    local.until(lambda: done.first[0].states()[0].name == "CANCELLED")
    assert done.wait(10) == "CANCELLED"
    assert done.runs[0].newest() is None


def test_one_plan(chain, tmp_path):
    done = chain("then=[{export: safetensors, out: exported}]", dry_run=True)
    text = "\n".join(chain.said)
    assert text.index("before-") < text.index(f"run: {done.path} (new)") < text.index("then: export as")
    assert f"model.image.weights ({done.first[0].path} is made first)" in text
    assert not (tmp_path / "runs").exists()


def test_what_is_made_first_need_not_be_there_and_all_else_must(recipe, tmp_path, monkeypatch, no_slurm):
    said = []
    first = f"first=[{{convert: digits, out: {tmp_path / 'new'}}}]"
    shards = f"data.train.0.shards={tmp_path / 'new' / 'train'}"
    given = {"dry_run": True, "runs": tmp_path / "runs", "say": said.append}
    api.submit(recipe, [*PLAN, first, shards], **given)
    assert f"first: digits to {tmp_path / 'new'}" in said
    assert any("data.train.0.shards" in line and "is made first" in line for line in said)
    elsewhere = [*PLAN, first, f"data.train.0.shards={tmp_path / 'elsewhere'}"]
    for dry_run in (True, False):
        with pytest.raises(UserError, match="elsewhere"):
            api.submit(recipe, elsewhere, **{**given, "dry_run": dry_run})
        assert not (tmp_path / "new").exists()  # nothing was started
    overrides = [*PLAN, first, shards, "data.batch_size=129", "cluster.tasks_per_node=2"]
    with pytest.raises(UserError, match="does not divide by 2 ranks"):
        api.submit(recipe, overrides, **given)


def test_a_conversion_here_is_made_before_it_returns(tmp_path, no_slurm):
    said = []
    done = api.convert("digits", out=tmp_path / "digits", say=said.append)
    assert (done.state, done.wait()) == ("FINISHED", "FINISHED")
    api.convert("digits", out=tmp_path / "digits", say=said.append)
    assert said[-1] == f"{tmp_path / 'digits'}: complete already"
    assert Conversion(tmp_path / "nothing").state == "STOPPED"
    queued = tmp_path / "queued" / array.FOLDER
    queued.mkdir(parents=True)
    files.write_json(queued / array.JOB, {"jobs": ["17_0"]})
    assert Conversion(queued.parent).state == "UNKNOWN"  # not STOPPED: SLURM gives no answer
    with pytest.raises(TimeoutError):
        Conversion(queued.parent).wait(0)
    with pytest.raises(UserError, match="no option smaples_per_shard; did you mean samples_per_shard"):
        api.convert("digits", out=tmp_path / "other", options={"smaples_per_shard": 3})


def test_nothing_is_queued_behind_a_conversion_of_which_a_job_has_failed(tmp_path, programs):
    folder = tmp_path / "out" / array.FOLDER
    (folder / "failed").mkdir(parents=True)
    files.write_json(folder / array.JOB, {"jobs": ["17_0", "17_1"]})
    programs(squeue="echo '17_1|RUNNING|low|me|0:01|1:00|N/A|n1|None|convert-out'")
    (awaited,) = api._awaited([Conversion(folder.parent)])
    assert awaited.jobs == ("17_1",)
    (folder / "failed" / "17_0").touch()
    with pytest.raises(UserError, match=r"job 17_0, which makes a part of it, failed.*scancel 17\)"):
        api._awaited([Conversion(folder.parent)])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("first=[{recipe: a.yaml, convert: digits}]", "has recipe and convert|has convert and recipe"),
        ("first=[{recipe: a.yaml, givse: []}]", "unknown key"),
        ("first=[{convert: digits}]", "the key first.0.convert.out|the key first.0.out is missing"),
        ("then=[{export: pdf, out: x}]", "should be"),
    ],
)
def test_what_is_wrong_in_a_chain_is_said(recipe, section, message):
    with pytest.raises(UserError, match=message):
        load_chain(recipe, [section])
    assert load_chain(recipe, [section, f"{section.partition('=')[0]}=null"]) == Chain()


def test_a_run_that_would_come_before_itself_is_refused(recipe, tmp_path, no_slurm):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {recipe}\nfirst: [{{recipe: {other}.yaml}}]\n")
    with pytest.raises(UserError, match=r"first: b.yaml would have to be finished before itself"):
        api.submit(tmp_path / "a.yaml", dry_run=True)


def test_what_follows_each_member_of_a_sweep_has_a_place_of_its_own():
    export = Export(export="hf", out="/out/v1.0")
    measure = Measure(evaluate=(), out="/out/v1.json")
    assert [order_of(step)["out"] for step in (export, measure)] == ["/out/v1.0", "/out/v1.json"]
    places = [order_of(step, "toy-lr=0.1-0")["out"] for step in (export, measure)]
    assert places == ["/out/v1.0/toy-lr=0.1-0", "/out/v1/toy-lr=0.1-0.json"]


def test_nothing_follows_a_run_whose_job_is_not_known_yet(run):
    run.update_settings({"executor": "slurm", "code": "code-1"})
    submissions.intend(run, "slurm", "code-1")
    order = order_of(Export(export="hf", out="/out"))
    with pytest.raises(UserError, match="is SUBMITTING"):
        submit_step(run, order, print)


def test_a_job_does_not_start_before_what_it_waits_for_has_finished(run, tmp_path, no_slurm, monkeypatch):
    monkeypatch.setattr("jobs.endings.act.LISTED_SECONDS", 0)
    first = Run.create(tmp_path / "runs" / "first-00000000", {}, {})
    run.update_settings({**run.settings(), "after": [str(first.path), str(tmp_path / "gone")]})
    attempt = first.claim("16", host="n1", still_running=lambda job: False)
    assert claim(run, "17", Slurm()) is None
    attempt.write_outcome(outcome_name="finished", code=0, rank=0)
    assert claim(run, "17", Slurm()).number == 1
    first.claim("18", host="n1", still_running=lambda job: False)
    assert claim(run, "17", Slurm()).number == 2  # what has begun goes on


def test_a_chain_is_found_by_its_name_wherever_its_runs_were_moved(run):
    runs = run.path.parent
    step = Run.create(run.path / "then" / "toy-export", {}, {})
    chains.record("toy", runs, [Path("/data")], [run])
    chains.record("toy", runs, [Path("/data"), Path("/more")], [run, step])
    moved = runs.rename(runs.with_name("moved"))
    found = chains.find_chain("toy", moved)
    assert found.conversions == [Path("/data"), Path("/more")]
    paths = [moved / run.name, moved / run.name / "then" / "toy-export"]
    assert [link.path.resolve() for link in found.runs] == paths
    assert [link.name for link in api.submission("toy", runs=moved).runs] == [run.name, "toy-export"]


def test_python_says_what_the_command_says(recipe, tmp_path, no_slurm, capsys):
    said = []
    keys = {"optim.lr": 2e-3, "optim.betas": numpy.array([0.9, 0.98]), "data.workers": numpy.int64(0)}
    api.submit(recipe, keys, runs=tmp_path, dry_run=True, say=said.append)
    words = ["submit", str(recipe), "optim.lr=2e-3", "data.workers=0", "optim.betas=[0.9, 0.98]"]
    words += ["--runs", str(tmp_path), "--dry-run"]
    command_for(words).main(words, standalone_mode=False)
    assert capsys.readouterr().out.splitlines() == said


def test_one_import():
    names = ("submit", "submission")
    assert all(getattr(clipcluster, name) is getattr(api, name) for name in names)
