"""Run by test_global_batch: whole runs of real recipes, each on a world of real processes.

python runs_of_ranks.py RUN:SIZE[:QUESTIONS] …  trains a run folder on so many ranks; with QUESTIONS it is
stopped at that question of rank 0 whether to continue, and resumed by a second attempt.
The processes are forked after the imports, before any backward pass.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch._dynamo  # an optimizer loads it: once here, not once a rank
import torch.utils.tensorboard
from transformers import AutoConfig, AutoModel

sys.path.append(str(Path(__file__).parents[1]))

from forked import exit_codes
from stop_after import StopAfter

import clipcluster.build.training  # noqa: F401
from clipcluster.run import train
from clipcluster.runs.folder import Run
from clipcluster.runtime.launch import Launch


def rank(path: str, number: int, size: int, questions: int) -> None:
    torch.set_num_threads(1)
    run = Run(path)
    attempt = run.newest()
    assert attempt
    launch = Launch(number, size, number, size, 0, 1, "test", "torchrun")
    sys.exit(int(train(run, attempt, launch, StopAfter(questions if number == 0 else 0))))


def attempt(path: str, size: int, questions: int, expected: int) -> None:
    Run(path).claim("test", host="here", still_running=lambda job: False)
    codes = exit_codes(rank, [(path, number, size, questions) for number in range(size)])
    assert codes == [expected] * size


def main() -> None:
    AutoModel.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=1))  # loads what it needs
    for job in sys.argv[1:]:
        path, size, *questions = job.split(":")
        if questions:
            attempt(path, int(size), int(questions[0]), expected=85)
        attempt(path, int(size), 0, expected=0)


if __name__ == "__main__":
    main()
