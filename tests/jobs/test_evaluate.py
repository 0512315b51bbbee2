"""What `clipcluster evaluate` refuses, it refuses before torch is loaded."""

import subprocess
import sys
from pathlib import Path

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
    assert "has no checkpoint to measure: none was written yet" in lines[1]
    assert "evaluate.zero_shotz" in lines[2]
    assert "There is nothing to measure" in lines[3]
    assert "/nowhere" in lines[4]
    assert lines[5] == "[]"
