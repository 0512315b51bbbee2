"""What `clipcluster evaluate` refuses, it refuses before torch is loaded; results as people read them."""

import io
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from clipcluster.runs import files
from jobs.evaluate import latest, shown
from jobs.submit.submit import Wanted, submit

ROOT = Path(__file__).resolve().parents[2]
REFUSED = """
import sys
from pathlib import Path
from clipcluster.errors import UserError
from jobs.evaluate import evaluate

runs = Path(sys.argv[1])
for what, *overrides in (words.split() for words in sys.argv[2:]):
    try:
        evaluate(what, overrides, runs)
    except UserError as error:
        print(str(error).splitlines()[0])
print([name for name in ("torch", "timm", "transformers") if name in sys.modules])
"""


def test_refusals_come_before_torch(recipe, tmp_path):
    run = submit(Wanted(recipe, runs=tmp_path / "runs", executor="none", quick=True, say=str)).run
    saved = submit(
        Wanted(recipe, ["seed=1"], runs=tmp_path / "runs", executor="none", quick=True, say=str)
    ).run
    (saved.checkpoints / "step-00000004").mkdir()
    words = [
        "nothing",
        run.name,
        f"{saved.name} evaluate.zero_shotz=[]",
        f"{saved.name} evaluate.zero_shot=[] evaluate.retrieval=[]",
        f"{saved.name} evaluate.zero_shot=[/nowhere]",
    ]
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, tmp_path / "runs", *words], capture_output=True, text=True, cwd=ROOT
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stderr
    assert "There is no run 'nothing'" in lines[0]
    assert "has no checkpoint: none was written yet" in lines[1]
    assert "evaluate.zero_shotz" in lines[2]
    assert "There is nothing to measure" in lines[3]
    assert "/nowhere" in lines[4]
    assert lines[5] == "[]"


METRICS = {"a/paired_i2t_r1": 0.1, "a/distinct_captions": 5000, "b/i2t_r1": None, "a/zero_shot_top1": 0.5}


def lines_of(run, **how):
    console = Console(file=io.StringIO(), width=200)
    console.print(shown(latest(run), **how))
    assert " \n" not in console.file.getvalue()
    return [line.strip() for line in console.file.getvalue().splitlines()]


def test_the_headline_alone_or_all_of_it(run):
    assert latest(run) is None
    run.evals.mkdir(exist_ok=True)
    files.write_json(run.evals / "step-00000003.json", {"step": 3, "metrics": METRICS})
    lines = lines_of(run)
    assert lines[0] == "evaluation at step 3"
    assert [line.split() for line in lines[1:]] == [
        ["a", "zero-shot", "top1", "50.00", "%"],
        ["b", "retrieval", "i2t_r1", "not", "finite"],
        ["and", "2", "more:", "clipcluster", "evaluate", "…", "--all"],
    ]
    lines = lines_of(run, all_of_it=True)
    assert lines[0] == "evaluation at step 3"
    assert [line.split(" (")[0] for line in lines[1::2]] == [
        "zero-shot",
        "retrieval",
        "retrieval, paired",
        "counts",
    ]
    assert [line.split() for line in lines[2::2]] == [
        ["a", "top1", "50.00", "%"],
        ["b", "i2t_r1", "not", "finite"],
        ["a", "i2t_r1", "10.00", "%"],
        ["a", "distinct_captions", "5,000"],
    ]
    assert "an image's other captions are wrong" in lines[5]
    files.write_json(run.evals / "step-00000004.json", {"step": 4, "metrics": {"a/top1": 0.25}})
    assert [line.split() for line in lines_of(run)[1:]] == [["a", "classification", "top1", "25.00", "%"]]
