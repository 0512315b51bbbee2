"""The run folder: made whole, named by content, claimed by one job at a time, found again."""

import os
import string
import subprocess
import sys
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clipcluster.errors import UserError
from clipcluster.runs import folder
from clipcluster.runs.folder import AlreadyOwned, Run
from clipcluster.runs.names import find_run, run_name, runs_folder, similar_runs

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
trees = st.dictionaries(
    st.text(string.ascii_lowercase, min_size=1),
    st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(string.ascii_lowercase, min_size=1), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=5,
)


def shuffled(value):
    """The same mapping, written in another order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(list(value))}
    if isinstance(value, list):
        return tuple(shuffled(inner) for inner in value)
    return value


def test_created_whole(run):
    assert run.exists()
    assert run.recipe() == {"name": "digits", "seed": 1}
    assert run.settings() == {"train": {"log_every": 10}}
    assert run.newest() is None
    assert not run.finished()
    assert run.cancelled_jobs() == set()
    assert [name for name in os.listdir(run.path.parent) if name != run.name] == []


def test_created_once(run):
    with pytest.raises(FileExistsError):
        Run.create(run.path, {"seed": 2}, {})
    assert run.recipe()["seed"] == 1
    assert os.listdir(run.path.parent) == [run.name]


def test_assets_are_copied_whole_or_no_run_is_made(tmp_path):
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "tokenizer.json").write_text("{}")
    assert (Run.create(tmp_path / "a-0", {}, {}, assets=assets).assets / "tokenizer.json").is_file()
    (assets / "model").symlink_to("/nowhere/model")
    with pytest.raises(OSError, match="No such file"):
        Run.create(tmp_path / "a-1", {}, {}, assets=assets)
    assert sorted(os.listdir(tmp_path)) == ["a-0", "assets"]


def test_numbers_survive_the_yaml(tmp_path):
    recipe = {"lr": 7e-4, "eps": 1e-8, "large": 1e22, "text": "7e-4", "none": None, "Ä": ["ß"]}
    assert Run.create(tmp_path / "a", recipe, {}).recipe() == recipe


def test_settings_change_for_later_attempts_only(run, claim):
    first = claim()
    run.update_settings({"train": {"log_every": 20}})
    assert first.settings() == {"train": {"log_every": 10}}
    assert claim().settings() == {"train": {"log_every": 20}}


def test_claims_count_up(run, claim):
    assert [claim().number for _ in range(11)] == list(range(1, 12))
    assert run.newest().number == 11
    assert [attempt.number for attempt in run.attempts()] == list(range(1, 12))
    claimed = run.newest().claim()
    assert (claimed["job"], claimed["host"]) == ("1", "n1")
    assert claimed["time"] > 0


def test_a_job_claims_again_without_asking(run):
    def ask(job_id):
        raise AssertionError(f"asked about {job_id}")

    run.claim("7_1", host="n1", still_running=ask)
    assert run.claim("7_1", host="n2", still_running=ask).number == 2


def test_a_running_owner_is_named(run, claim):
    claim("41")
    with pytest.raises(AlreadyOwned, match="job 41") as caught:
        run.claim("42", host="n2", still_running=lambda job: job == "41")
    assert caught.value.job_id == "41"
    assert run.newest().number == 1
    assert run.claim("42", host="n2", still_running=lambda job: False).number == 2


def test_an_attempt_without_a_claim_is_nobodys(run):
    (run.attempts_dir / "3").mkdir()
    assert run.claim("1", host="n1", still_running=lambda job: True).number == 4


def test_of_many_that_claim_at_once_one_succeeds(run, claim):
    claim("old")
    code = (
        "import sys, pathlib, time\n"
        "from clipcluster.runs.folder import AlreadyOwned, Run\n"
        "run = Run(sys.argv[1])\n"
        "while not (run.path / 'go').exists(): time.sleep(0.001)\n"
        "try: print(run.claim(sys.argv[2], host='h', still_running=lambda job: job != 'old').number)\n"
        "except AlreadyOwned as error: print(error.job_id)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, run.path, f"new{i}"], stdout=subprocess.PIPE, text=True)
        for i in range(6)
    ]
    (run.path / "go").touch()
    said = [process.communicate()[0].strip() for process in processes]
    winner = f"new{said.index('2')}"
    assert sorted(said) == sorted(["2"] + [winner] * 5)
    assert run.newest().job == winner
    assert sorted(os.listdir(run.attempts_dir)) == ["1", "2"]


class Late(Run):
    """A run whose newest attempt comes late into the listing, as over NFS."""

    def __init__(self, path, seconds):
        super().__init__(path)
        self.looks, self.shown = 0, time.monotonic() + seconds

    def attempts(self):
        self.looks += 1
        return super().attempts()[: None if time.monotonic() > self.shown else -1]


def test_a_claim_waits_for_the_listing_to_show_the_attempt_that_was_first(run, claim, monkeypatch):
    claim("first")
    late = Late(run.path, 0.3)
    with pytest.raises(AlreadyOwned, match="job first"):
        late.claim("second", host="n2", still_running=lambda job: True)
    assert late.looks < 10
    monkeypatch.setattr(folder, "LISTED_SECONDS", 0.2)
    with pytest.raises(FileExistsError, match="attempts/1"):
        Late(run.path, 2.0).claim("second", host="n2", still_running=lambda job: True)
    assert os.listdir(run.attempts_dir) == ["1"]


def test_finished_is_what_the_newest_attempt_says(run, claim):
    outcome = {"code": 0, "rank": 0}
    claim().write_outcome(outcome_name="stopped", **outcome)
    assert not run.finished()
    second = claim()
    assert not run.finished()
    second.write_outcome(outcome_name="finished", **outcome)
    assert run.finished()


def test_marks_add_up(run):
    run.mark_cancelled(["7", "8_1"])
    run.mark_cancelled(["8_1", "9"])
    assert run.cancelled_jobs() == {"7", "8_1", "9"}
    assert (run.marks / "cancelled").read_text().split() == ["7", "8_1", "9"]


def test_missing_attempt(run, claim):
    claim()
    with pytest.raises(UserError, match=r"no attempt 2; there are: 1"):
        run.attempt(2)


@given(result=trees)
def test_name_is_a_function_of_content_alone(result):
    name = run_name("digits", result)
    assert name == run_name("digits", shuffled(result))
    assert name.startswith("digits-")
    assert len(name) == len("digits-") + 8


@given(first=trees, second=trees)
def test_other_content_has_another_name(first, second):
    if first != second:
        assert run_name("a", first) != run_name("a", second)


def test_name_is_fixed_for_all_times():
    # Written down: a change of this function would lose users their runs.
    assert run_name("digits", {"seed": 1, "optim": {"lr": 7.0e-4}}) == "digits-d1b7af8d"


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "a b", "-x", "ü", "a\n"])
def test_name_must_do_as_a_folder(name):
    with pytest.raises(UserError, match="name:"):
        run_name(name, {})


def make(folder, name, recipe):
    return Run.create(folder / run_name(name, recipe), recipe, {})


def test_near_twins_say_which_key(tmp_path):
    base = {"name": "coco", "optim": {"lr": 1e-3, "betas": [0.9, 0.98]}, "data": {"batch_size": 384}}
    twin = make(tmp_path, "coco", base)
    make(tmp_path, "coco-large", base)
    make(tmp_path, "coco", {"optim": {"lr": 5.0, "betas": [1, 2]}, "data": {"batch_size": 1}, "seed": 4})
    new = {
        "name": "coco",
        "optim": {"lr": 1e-3, "betas": [0.9, 0.999]},
        "data": {"batch_size": 384},
        "seed": 3,
    }
    found = similar_runs("coco", new, tmp_path)
    assert [(run.name, differences) for run, differences in found] == [
        (twin.name, {"optim.betas.1": (0.999, 0.98), "seed": (3, None)})
    ]
    assert similar_runs("coco", base, tmp_path) == []  # the run itself is not listed


@given(first=trees, second=trees)
@example(first={}, second={"a": "\x85"})  # a line break to YAML, a character to us
@example(first={}, second={"a\u2028": "b\u2029c\r\n"})
def test_twins_differ_both_ways_alike(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("twins")
    first.pop("name", None), second.pop("name", None)
    make(folder, "a", first)
    found = similar_runs("a", second, folder, at_most=100)
    if not found:
        return
    other = tmp_path_factory.mktemp("twins")
    make(other, "a", second)
    ((_, back),) = similar_runs("a", first, other, at_most=100)
    assert {key: (here, there) for key, (there, here) in back.items()} == found[0][1]


def test_where_runs_live(monkeypatch, tmp_path):
    monkeypatch.delenv("CLIPCLUSTER_RUNS", raising=False)
    assert str(runs_folder(None)) == "runs"
    monkeypatch.setenv("CLIPCLUSTER_RUNS", "/scratch/runs")
    assert str(runs_folder(None)) == "/scratch/runs"
    assert runs_folder(tmp_path) == tmp_path


def test_found_by_folder_name_and_beginning(tmp_path, monkeypatch):
    small, large = make(tmp_path, "digits", {"seed": 1}), make(tmp_path, "digits-large", {})
    monkeypatch.chdir(tmp_path.parent)
    assert find_run(str(small.path), tmp_path / "elsewhere").path == small.path
    assert find_run(small.name, tmp_path).path == small.path
    assert find_run("digits-l", tmp_path).path == large.path
    assert find_run(small.name[:-1], tmp_path).path == small.path


def test_a_name_that_begins_another_is_found(tmp_path):
    for name in ("digits-0000000a", "digits-0000000a-more"):
        Run.create(tmp_path / name, {}, {})
    assert find_run("digits-0000000a", tmp_path).name == "digits-0000000a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("digits", r"several runs.*digits-0000000a, digits-0000000b"),
        ("coco", r"no run 'coco'.*digits-0000000a"),
        ("", r"no run ''"),
    ],
)
def test_not_found_says_what_is_there(tmp_path, text, message):
    for name in ("digits-0000000a", "digits-0000000b"):
        Run.create(tmp_path / name, {}, {})
    with pytest.raises(UserError, match=message):
        find_run(text, tmp_path)


def test_no_runs_at_all(tmp_path):
    with pytest.raises(UserError, match="no run at all"):
        find_run("digits", tmp_path / "nowhere")
