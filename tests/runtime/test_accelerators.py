import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipcluster.runtime.accelerators import _count_amd, _visible, count_accelerators


def test_it_counts_what_torch_sees() -> None:
    import torch

    expected = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert count_accelerators() == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("2, 0", 2),
        ("0,9,1", 1),  # CUDA stops at the first that does not exist
        ("1,1", 0),
        ("GPU-8932f937-d72c,MIG-af3", 2),
    ],
)
def test_a_variable_limits_what_is_visible(names: str | None, expected: int) -> None:
    assert _visible(4, names) == expected


def test_amd_processors_are_no_accelerators(tmp_path: Path) -> None:
    for node, simd in enumerate((0, 304, 304)):
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "properties").write_text(f"cpu_cores_count 0\nsimd_count {simd}\n")
    assert _count_amd(tmp_path) == 2
    assert _count_amd(tmp_path / "absent") == 0


def test_torch_is_not_loaded() -> None:
    code = (
        "import sys; from clipcluster.runtime.accelerators import count_accelerators as c; c(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
