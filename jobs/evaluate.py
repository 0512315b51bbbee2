"""`clipcluster evaluate`: measure a run's checkpoint again, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.runs.checkpoints import MANIFEST, is_complete, name_of, steps_in
from clipcluster.runs.find import find_run
from clipcluster.runs.folder import Run
from clipcluster.runtime.environment import share_cores


def evaluate(what: str, overrides: Sequence[str], runs: Path) -> dict[str, Any]:
    """The results document of a run's newest checkpoint, or of the one named by its folder.

    Raises UserError where there is none.
    """
    checkpoint = Path(what).absolute()
    if (checkpoint / MANIFEST).is_file():
        run = Run(checkpoint.parent.parent)
        if not run.exists():
            raise UserError(f"{what} lies in no run folder: {run.path} has no recipe.yaml")
        return _measure(run, overrides, checkpoint)
    if (inside := Run(checkpoint.parent.parent)).exists():
        names = [name_of(step) for step in steps_in(inside.checkpoints)]
        whole = [name for name in names if is_complete(inside.checkpoints / name)]
        raise UserError(
            f"{what} is not a complete checkpoint; {inside.name} has {', '.join(whole) or 'none'}."
        )
    return _measure(find_run(what, runs), overrides, None)


def _measure(run: Run, overrides: Sequence[str], checkpoint: Path | None) -> dict[str, Any]:
    from clipcluster import run as running

    share_cores()
    return running.evaluate(run, overrides=overrides, checkpoint=checkpoint)
