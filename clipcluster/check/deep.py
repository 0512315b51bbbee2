"""The deep check: what needs torch, tried in a process of its own: the command itself never loads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from clipcluster.check.findings import Findings
from clipcluster.recipe.sections.recipe import Recipe

DEEP_SECONDS = 900  # large towers take minutes to build on a busy login node


def check(recipe: Recipe, *, world_size: int = 1, assets: Path | None = None) -> Findings:
    """Try what needs torch, in a process of its own.

    Args:
        recipe: with absolute paths (`plain.Checked.recipe`).
        world_size: ranks the run will have.
        assets: folder of tokenizers and configurations fetched at submission.
    """
    question = {
        "recipe": recipe.model_dump(mode="json"),
        "world_size": world_size,
        "assets": str(assets) if assets else None,
    }
    root = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    try:
        process = subprocess.run(
            [sys.executable, "-m", "clipcluster.check"],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            timeout=DEEP_SECONDS,
            env={**os.environ, "PYTHONPATH": search},
        )
    except subprocess.TimeoutExpired:
        return Findings(errors=[f"the deep check took longer than {DEEP_SECONDS} s; submit --quick omits it"])
    if process.returncode != 0:
        output = process.stderr.strip()
        return Findings(errors=[f"the deep check itself failed (code {process.returncode}):\n{output}"])
    return Findings(**json.loads(process.stdout))
