"""Toy runs in this process and over real ranks."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

HERE = str(Path(__file__).parent)
# What toy_training imports: a fork server of Python 3.11 does not know the path to that itself.
PRELOADED = [
    *("toy_training", "torch.utils.tensorboard", "timm", "transformers.models.gpt2.modeling_gpt2"),
    *("clipcluster.build.stages", "clipcluster.train.trainer"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The module toy_training.py."""
    if HERE not in sys.path:
        sys.path.append(HERE)
    return importlib.import_module("toy_training")


@pytest.fixture
def run(tmp_path: Path, toy: ModuleType) -> Any:
    """A fresh run folder."""
    return toy.new_run(tmp_path / "runs" / "toy-00000000")


class Ranks:
    """Processes of one run, each a rank."""

    def __init__(self, toy: ModuleType, run: Any, size: int, attempts: tuple[dict[str, Any], ...]) -> None:
        # From a server that has torch loaded: ten seconds of imports a rank are saved.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.logs = [run.path / f"rank-{rank}.log" for rank in range(size)]
        self.processes = [
            context.Process(target=toy.rank, args=(str(run.path), rank, size, str(log), list(attempts)))
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def finish(self, expected: int) -> None:
        """Wait for all; what they said is shown where one did not leave with the expected code."""
        for process in self.processes:
            process.join(120)
        codes = [process.exitcode for process in self.processes]
        assert codes == [expected] * len(codes), "\n".join(log.read_text() for log in self.logs)


@pytest.fixture
def start_ranks(toy: ModuleType) -> Iterator[Any]:
    """Start a run's ranks, a script for each attempt; those still alive at the end are killed."""
    started: list[Ranks] = []

    def start(run: Any, size: int, *attempts: dict[str, Any]) -> Ranks:
        started.append(Ranks(toy, run, size, attempts))
        return started[-1]

    yield start
    for process in (process for ranks in started for process in ranks.processes):
        process.kill()
        process.join()
