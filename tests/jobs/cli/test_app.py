"""The command as users type it, in processes of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clipcluster.runs.folder import Run
from jobs import metrics
from jobs.cli.app import main
from jobs.cli.options import print_document
from jobs.endings import history

ROOT = Path(__file__).resolve().parents[3]
QUICK = 1.5  # seconds of processor time for what needs no torch


def clipcluster(*words, **more):
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, words)], capture_output=True, text=True, cwd=ROOT, **more
    )


def fails(done, *parts):
    """One message on stderr, code 2, no traceback."""
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""
    for part in parts:
        assert part in done.stderr


@pytest.fixture
def finished(run):
    """A finished run with two attempts of metrics and an evaluation."""
    for steps in ((1, 2, 3), (3, 4)):
        attempt = run.claim("17", host="n1", still_running=lambda job: False)
        for step in steps:
            attempt.metrics({"step": step, "loss": step / attempt.number})
        (attempt.path / "rank-0.out").write_text(f"attempt {attempt.number} says\n")
    attempt.event("finish", writer=history.WRITER, ending="finished", code=0)
    return run


TORCH_FREE = """
import sys, time
from jobs.cli.app import main
sys.argv = ["clipcluster", *{words!r}]
try:
    main()
finally:
    loaded = [name for name in ("torch", "timm", "transformers", "torchvision") if name in sys.modules]
    print("LOADED", loaded)
"""


@pytest.mark.parametrize("verb", ["check", "dry run", "status", "metrics", "cancel", "submit"])
def test_no_torch(verb, recipe, finished, tmp_path, no_slurm):
    runs = str(finished.path.parent)
    words = {
        "check": ["check", str(recipe)],
        "dry run": ["submit", str(recipe), "--dry-run", "--runs", runs],
        "status": ["status", "--runs", runs],
        "metrics": ["metrics", "toy", "--runs", runs],
        "cancel": ["cancel", "toy", "--runs", runs],
        "submit": ["submit", str(recipe), "--executor", "slurm", "--runs", runs],
    }[verb]
    done = subprocess.run(
        [sys.executable, "-c", TORCH_FREE.format(words=words)], capture_output=True, text=True, cwd=ROOT
    )
    assert "LOADED []" in done.stdout, done.stderr


def cpu_seconds() -> float:
    """Of all child processes so far: wall time would tell of the machine's other work too."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.parametrize("words", [["check"], ["submit", "--dry-run", "--executor", "local"]])
def test_instant(recipe, words, tmp_path):
    clipcluster(words[0], recipe, *words[1:])  # the files are in the machine's cache now
    seconds = []
    for _ in range(5):
        before = cpu_seconds()
        done = (
            clipcluster(words[0], recipe, *words[1:], "--runs", tmp_path)
            if words[1:]
            else clipcluster(words[0], recipe)
        )
        seconds.append(cpu_seconds() - before)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < QUICK
    assert list(tmp_path.glob("*-????????")) == []


def test_errors_of_the_deep_check_are_one_message_after_the_facts(recipe):
    override = "model.image.args={no_such_argument: 1, and_a_second_one_with_a_rather_long_name: 2}"
    done = clipcluster("check", recipe, "--deep", override)
    assert done.returncode == 2
    assert "  data            1,437 samples in 1 source\n" in done.stdout
    assert "no problems found" not in done.stdout
    said = " ".join(done.stderr.split())
    assert said.startswith("error: model.image: timm cannot build")
    assert "no_such_argument" in said


def test_the_check_as_json_is_one_document(recipe, tmp_path, no_slurm):
    override = "checkpoint.keep.best={metric: test/t2i_r2}"
    done = clipcluster("check", recipe, override, "data.workers=9", "--json", "--runs", tmp_path)
    assert (done.returncode, done.stderr) == (2, "")
    told = json.loads(done.stdout)
    assert told.keys() == {"recipe", "errors", "warnings", "facts", "not_checked", "figures"}
    assert "did you mean test/t2i_r5?" in told["errors"][0]
    assert "data.workers" in told["warnings"][0]
    assert {"subject": "data", "text": "1,437 samples in 1 source"} in told["facts"]
    assert told["figures"]["total_steps"] == 528
    assert "memory" in told["not_checked"][0]
    done = clipcluster("check", recipe, "optim.lrr=1", "--json")
    assert (done.returncode, done.stderr) == (2, "")
    assert "did you mean optim.lr?" in json.loads(done.stdout)["errors"][0]


def test_status_as_json_is_one_document(finished):
    done = clipcluster("status", "--json", "--runs", finished.path.parent)
    (report,) = json.loads(done.stdout)
    assert (report["name"], report["state"], report["step"]) == (finished.name, "FINISHED", 4)
    assert done.stderr == ""


def test_status_for_people(finished, tmp_path):
    done = clipcluster("status", "--runs", finished.path.parent)
    assert finished.name in done.stdout
    assert "FINISHED" in done.stdout
    assert done.stdout == re.sub(" +\n", "\n", done.stdout)
    narrow = clipcluster("status", "--runs", finished.path.parent, env={**os.environ, "COLUMNS": "60"})
    assert max(map(len, narrow.stdout.splitlines())) <= 60
    assert "4/20" in done.stdout
    assert "no runs in" in clipcluster("status", "--runs", tmp_path / "none").stdout


def test_a_name_that_is_not_utf_8_can_be_shown(run):
    attempt = run.claim("17", host="n1", still_running=lambda job: False)
    reason = os.fsdecode(b"caf\xe9.tar changed")
    attempt.event("fail", writer=history.WRITER, ending="failed", code=90, reason=reason)
    assert r"caf\udce9.tar changed" in clipcluster("status", run.path).stdout
    assert json.loads(clipcluster("status", run.path, "--json").stdout)[0]["detail"] == reason


def test_metrics_of_all_attempts(finished):
    done = clipcluster("metrics", finished.path, "--csv")
    lines = done.stdout.splitlines()
    assert lines[0] == "step,loss,time,attempt"
    assert [line.split(",")[:2] for line in lines[1:]] == [
        ["1", "1.0"],
        ["2", "2.0"],
        ["3", "1.5"],
        ["4", "2.0"],
    ]
    as_json = clipcluster("metrics", finished.path, "--jsonl").stdout.splitlines()
    assert [json.loads(line)["attempt"] for line in as_json] == [1, 1, 2, 2]
    fails(clipcluster("metrics", finished.path, "--csv", "--jsonl"), "give one of them")


def test_metrics_for_people(finished, tmp_path):
    words = clipcluster("metrics", finished.path).stdout.split()
    assert words[:6] == ["step", "loss", "attempt", "1", "1.0000", "1"]
    chosen = clipcluster("--runs", tmp_path, "metrics", finished.path, "--columns", "loss,step", "--every", 2)
    assert chosen.stdout.split() == ["loss", "step", "1.0000", "1", "2.0000", "2", "2.0000", "4"]
    fails(clipcluster("metrics", finished.path, "--columns", "los"), "--columns los", "did you mean loss?")
    plot = clipcluster("metrics", finished.path, "--plot").stdout
    assert plot.startswith("loss\n         2 ┤")
    assert plot.count("•") == 4
    done = clipcluster("metrics", finished.path, "--picture", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG"), done.stderr
    for name in ("loss", "loss.what", "loss.gif"):
        fails(clipcluster("metrics", finished.path, "--picture", tmp_path / name), "ends in .png, .pdf")
        assert not (tmp_path / name).exists()
    fails(
        clipcluster("metrics", finished.path, "--picture", tmp_path / "x" / "loss.png"),
        "is not a folder",
        "make it",
    )


def test_a_long_run_is_thinned(run):
    attempt = run.claim("17", host="n1", still_running=lambda job: False)
    for step in range(1, 401):
        attempt.metrics({"step": step, "loss": float("nan") if step == 7 else 1 / step})
    lines = metrics.lines_of(run)
    assert len(lines) == 400
    steps = [line["step"] for line in metrics.thinned(lines)]
    assert (len(steps), steps[0], steps[-1]) == (metrics.ROWS, 1, 400)
    assert len(metrics.curves(lines, [])["loss"]) == 399
    rows = clipcluster("metrics", run.path, "--jsonl").stdout.splitlines()
    assert json.loads(rows[6])["loss"] is None
    assert json.loads(rows[6])["non_finite"] == ["loss"]


def test_a_document_has_no_nan(capsys):
    print_document([{"loss": float("inf"), "step": 3}])
    (document,) = json.loads(capsys.readouterr().out)
    assert document == {"loss": None, "step": 3, "non_finite": ["loss"]}


def test_logs(finished):
    assert clipcluster("logs", finished.path).stdout == "attempt 2 says\n"
    assert clipcluster("logs", finished.path, "--attempt", 1).stdout == "attempt 1 says\n"
    assert clipcluster("logs", "-f", finished.path).stdout == "attempt 2 says\n"
    fails(clipcluster("logs", finished.path, "--rank", 5), "no rank 5")
    fails(clipcluster("logs", finished.path, "--attempt", 9), "no attempt 9")


def test_logs_of_a_run_whose_ranks_never_started(run):
    attempt = run.claim("17", host="n1", still_running=lambda job: False)
    fails(clipcluster("logs", run.path), "has printed nothing yet")
    run.submitit.mkdir()
    (run.submitit / "17_0_log.err").write_text("ModuleNotFoundError: no such module\n")
    assert "ModuleNotFoundError" in clipcluster("logs", run.path).stdout
    assert attempt.number == 1


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["submti"], ["No such command 'submti'"]),
        (["submit"], ["RECIPE"]),
        (["submit", "nowhere.yaml", "--executor", "local"], ["nowhere.yaml"]),
        (["check", "recipes/digit.yaml"], ["digits.yaml"]),
        (["status", "nothing"], ["There is no run 'nothing'"]),
        (["cancel", "nothing"], ["There is no run 'nothing'"]),
        (["logs", "nothing"], ["There is no run 'nothing'"]),
        (["submit", "recipes/digits.yaml", "--executor", "moon"], ["moon", "local"]),
        (["shards", "convert", "stars", "--out", "x"], ["stars", "digits"]),
        (["shards", "index", "/nowhere"], ["/nowhere"]),
    ],
)
def test_one_message_for_an_error(words, parts, tmp_path):
    fails(clipcluster(*words, env={**os.environ, "CLIPCLUSTER_RUNS": str(tmp_path)}), *parts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("resume toy", "No such command 'resume'; instead: clipcluster submit RECIPE"),
        ("status --follow", "No such option: --follow; instead: --watch"),
        ("submit r.yaml --gpus 2", "No such option: --gpus; instead: cluster.gpus_per_node=2"),
        ("submit r.yaml --gres gpu:1", "No such option: --gres; instead: cluster.gpus_per_node=1"),
        ("submit r.yaml --gres=gpu:a100:2", "No such option: --gres; instead: cluster.gpus_per_node=2"),
        ("check r.yaml --lr=3e-4", "No such option: --lr; instead: optim.lr=3e-4"),
        ("submit r.yaml --epochs 4", "No such option: --epochs; instead: train.duration='4 epochs'"),
        ("submit r.yaml --time 90", "No such option: --time; instead: cluster.time='90 min'"),
        ("submit r.yaml --warmup 9", "No such option: --warmup; instead: optim.warmup='9 steps'"),
        ("submit r.yaml --optim.lr 1", "No such option: --optim.lr; instead: optim.lr=1"),
        ("--gpus 2 submit r.yaml", "No such option: --gpus; instead: cluster.gpus_per_node=2"),
        ("submit r.yaml --batch-size 2", "No such option: --batch-size; instead: data.batch_size=2"),
        ("submit --mem r.yaml", "No such option: --mem; instead: cluster.mem=r.yaml"),
        ("export toy --step 999", "No such option: --step; instead: RUN/checkpoints/step-00000999"),
        ("convert csv", "No such command 'convert'; instead: clipcluster shards convert"),
        ("metrics toy --every ten", "Invalid value for '--every': should be a valid integer; got 'ten'"),
        (
            "submit r.yaml --executor pbs",
            "Invalid value for '--executor': 'pbs' is not one of 'slurm', 'local', 'none'\nSee: ",
        ),
        ("sandbox start --nodes 65", "Invalid value for '--nodes': should be from 1 to 64; got '65'\nSee: "),
        ("bench loader --seconds 0", "Invalid value for '--seconds': should be from 0.1 to 3600; got '0'"),
        ("metrics x --every 0", "Invalid value for '--every': should be greater than or equal to 1; got '0'"),
        ("--runs train status nothing", "There is no run 'nothing'"),
        ("shards convert --out shards csv nothing.csv", "nothing.csv cannot be read"),
        ("--every=ten metrics toy", "Invalid value for '--every': should be a valid integer; got 'ten'"),
        ("status --runs README.md", "README.md is a file; runs lie in a folder"),
        (
            "check recipes/digits.yaml data.train=https://u:KEY@h/a.tar?k=KEY",
            "from the command line: data.train=",
        ),
    ],
)
def test_words_of_other_programs_get_a_pointer(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["clipcluster", *words.split()])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert "KEY@" not in said
    assert "=KEY" not in said


@pytest.mark.parametrize("words", [[], ["shards"], ["bench"]])
def test_a_group_without_a_command_prints_its_help_once(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["clipcluster", *words])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("Usage:") == 1


def test_a_conversion_as_json_is_one_document(tmp_path):
    for made in (True, False):
        done = clipcluster("shards", "convert", "digits", "--out", tmp_path / "digits", "--json")
        document = json.loads(done.stdout)
        assert document["made"] is made
        assert document["splits"]["test"]["samples"] == 360


def test_a_checkpoint_that_is_not_there_is_told_beside_those_that_are(run):
    for step in ("step-00000003", "step-00000004"):
        (run.checkpoints / step).mkdir(parents=True)
    (run.checkpoints / "step-00000003" / "manifest.json").touch()
    (run.checkpoints / "step-00000004" / "state.json").touch()
    manifest = {"files": {"state.json": {"bytes": 0, "sha256": ""}}}
    (run.checkpoints / "step-00000004" / "manifest.json").write_text(json.dumps(manifest))
    done = clipcluster("evaluate", run.checkpoints / "step-00000005")
    fails(done, f"is not a complete checkpoint; {run.name} has step-00000004")


def test_cancel(run):
    assert "nothing to cancel" in clipcluster("cancel", run.path).stdout
    run.claim("17", host="n1", still_running=lambda job: False)
    done = clipcluster("cancel", run.path, env={**os.environ, "PATH": "/nowhere"})
    fails(done, "marked as cancelled")
    assert run.cancelled_jobs() == {"17"}


def test_options_stand_before_or_after(finished, tmp_path):
    runs = finished.path.parent
    for words in (["--runs", runs, "status", "--json"], ["--json", f"--runs={runs}", "status", "toy"]):
        (report,) = json.loads(clipcluster(*words).stdout)
        assert report["name"] == finished.name
    assert (
        f"no sandbox in {tmp_path / 'x'}" in clipcluster("sandbox", "--dir", tmp_path / "x", "status").stderr
    )


def test_version():
    assert clipcluster("--version").stdout.startswith("clipcluster")


def test_help_names_every_verb():
    done = clipcluster("--help")
    for verb in (
        "check",
        "submit",
        "status",
        "logs",
        "metrics",
        "cancel",
        "evaluate",
        "export",
        "train",
        "shards",
        "sandbox",
    ):
        assert verb in done.stdout
        assert clipcluster(verb, "--help").returncode == 0


def test_training_from_the_command_needs_a_run(tmp_path):
    done = clipcluster("train", tmp_path)
    assert done.returncode == 2
    assert "is not a run folder" in done.stderr
    assert not Run(tmp_path).exists()
