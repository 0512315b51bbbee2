"""Toy runs in this process and over real ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TOY = Path(__file__).with_name("toy.py")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The module toy.py."""
    spec = importlib.util.spec_from_file_location("clipcluster_toy", TOY)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path, toy: ModuleType) -> Any:
    """A fresh run folder."""
    return toy.new_run(tmp_path / "runs" / "toy-00000000")


@pytest.fixture
def start_ranks() -> Any:
    """Start N processes of toy.py on a run, a script for each attempt; those still alive are ended after."""
    started: list[subprocess.Popen[str]] = []

    def start(run: Any, size: int, *attempts: dict[str, Any]) -> list[subprocess.Popen[str]]:
        common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(TOY), str(run.path), *(json.dumps(script) for script in attempts)]
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]
        started.extend(ranks)
        return ranks

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture
def finish_ranks() -> Callable[..., list[int]]:
    """Wait for ranks and return their codes; their output is shown where one is not as expected."""

    def finish(ranks: list[subprocess.Popen[str]], expected: int) -> None:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
        codes = [rank.returncode for rank in ranks]
        assert codes == [expected] * len(ranks), "\n".join(outputs)

    return finish
