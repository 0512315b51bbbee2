"""The walls: floors, lint, format, types, and what needs no torch never loading it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

TORCH_FREE = [
    "clipcluster.errors",
    "clipcluster.build.opened",
    "clipcluster.recipe.load",
    "clipcluster.recipe.plan",
    "clipcluster.runs.folder",
    "clipcluster.runs.merge",
    "clipcluster.runtime.outcome",
    "clipcluster.runtime.stop",
    "clipcluster.runtime.launch",
    "clipcluster.data.shards.open",
    "clipcluster.data.sampling.sampler",
    "clipcluster.rank.serve",
    "clipcluster.check.plain",
    "clipcluster.check.deep",
    "clipcluster.run",
    "tools.shards.repair",
    "tools.search.search",
    "tools.slurm",
    "tools.shards.stats",
    "tools.shards.verify",
    "tools.sandbox.sandbox",
    "jobs.cli.app",
    "jobs.submit.submit",
    "jobs.submit.checking",
    "jobs.submit.parameters",
    "jobs.submit.snapshot",
    "jobs.train",
    "jobs.endings.__main__",
    "jobs.state",
    "clipcluster.export.export",
    "jobs.init",
    "jobs.report.report",
    "jobs.api",
]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["lint-imports"],
    ],
    ids=["lint", "format", "types", "floors"],
)
def test_walls(command):
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", TORCH_FREE)
def test_needs_no_torch(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'timm', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_init_files_are_empty():
    filled = [
        str(path.relative_to(ROOT))
        for room in ("clipcluster", "jobs", "tools")
        for path in (ROOT / room).rglob("__init__.py")
        if path.read_text()
    ]
    assert filled == ["clipcluster/__init__.py"]  # offers what Python users call, and imports it at the call
