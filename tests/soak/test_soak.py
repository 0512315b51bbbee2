"""The soak itself, for a minute: as `make soak SECONDS=60` runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import need_slurm

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]


def test_a_minute_of_it():
    need_slurm()
    words = [sys.executable, "-m", "tests.soak", "--seconds", "60", "--seed", "1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert "18 of them equal to their uninterrupted twins" in done.stdout
    assert "no problem was found" in done.stdout
