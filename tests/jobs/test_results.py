"""Results of an evaluation as people read them."""

import io

from rich.console import Console

from clipcluster.runs import files
from jobs import results


def test_the_headline_comes_first(run):
    assert results.latest(run) is None
    metrics = {"a/paired_i2t_r1": 0.1, "a/distinct_captions": 5000, "b/i2t_r1": None, "a/zero_shot_top1": 0.5}
    run.evals.mkdir(exist_ok=True)
    files.write_json(run.evals / "step-00000003.json", {"step": 3, "metrics": metrics})
    console = Console(file=io.StringIO(), width=200)
    console.print(results.shown(results.latest(run)))
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
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
