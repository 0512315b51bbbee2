"""One thread a test; the tiny models of the model room are importable."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.extend(str(folder) for folder in (Path(__file__).parent, Path(__file__).parent.parent / "model"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
