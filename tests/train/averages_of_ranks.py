"""Run by test_ranks: two ranks whose weights are their own when training begins, as where a file differs.

python averages_of_ranks.py OUT RUN  writes OUT/RANK.safetensors: the average that each rank ends with.
The processes are forked after the imports, before any backward pass.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1]))

import toy_training as toy
from forked import run_worlds, world_over_gloo

from clipcluster.runs.folder import Run
from clipcluster.runtime.stop import Stop


def rank(out: Path, number: int, size: int, run: Run) -> None:
    with world_over_gloo(out, number, size) as world:
        attempt = run.newest()
        assert attempt
        trainer = toy.build(run, attempt, world, Stop(), toy.Script(steps=1, save_every=None))
        with torch.no_grad():
            trainer.parts["model"].first.weight.add_(number)
        trainer.step.ema.restart()
        trainer.run()
        save_file(trainer.step.ema.state_dict(), out / f"{number}.safetensors")


if __name__ == "__main__":
    sys.exit(run_worlds(rank, Path(sys.argv[1]), [2], Run(sys.argv[2])))
