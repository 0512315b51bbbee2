"""Several learning rates and seeds, and the best of them exported.

python -m jobs.examples.sweep runs
"""

from __future__ import annotations

import sys
from pathlib import Path

from clipcluster.recipe.files import RECIPES
from jobs.api import Submission, export, submit

VALUES = {"sweep.optim.lr": [1e-3, 3e-3, 5e-3], "sweep.seed": [0, 1], "sweep.parallel": 2}


def best_of(runs: Path) -> Submission:
    """Submit six runs, two at a time, wait for them, and export the one with the smallest loss."""
    sweep = submit(RECIPES / "digits.yaml", VALUES, runs=runs)
    sweep.wait(say=print)
    best = sweep.best("loss")
    print(f"the best is {best.name}")
    return export(best, "safetensors", out=runs / "best")


if __name__ == "__main__":
    best_of(Path(sys.argv[1]))
