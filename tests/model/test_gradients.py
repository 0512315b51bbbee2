"""The science does not depend on the number of processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SIZES = (1, 2, 3, 4)
WORKER = Path(__file__).with_name("step_of_ranks.py")


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    """By number of processes: the loss and the gradients of one step on the same 12 samples."""
    out = tmp_path_factory.mktemp("steps")
    command = [sys.executable, str(WORKER), str(out), *map(str, SIZES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return {size: torch.load(out / f"{size}.pt") for size in SIZES}


@pytest.mark.parametrize("size", SIZES[1:])
def test_gradients_equal_those_of_one_process(steps: dict[int, dict], size: int) -> None:
    alone, together = steps[1], steps[size]
    torch.testing.assert_close(together["loss"], alone["loss"], rtol=1e-6, atol=0)
    assert together["gradients"].keys() == alone["gradients"].keys()
    assert "model.logit_scale" in alone["gradients"]
    for name, expected in alone["gradients"].items():
        found = together["gradients"][name]
        assert found.dtype == torch.float64
        # Relative to the whole tensor: single entries near zero have no scale of their own.
        assert (found - expected).norm() <= 1e-6 * expected.norm(), name


def test_every_parameter_has_a_gradient(steps: dict[int, dict]) -> None:
    for name, gradient in steps[4]["gradients"].items():
        assert gradient is not None, name
