"""A run's folder, made ready for its launch: recipe, settings, assets, code."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcluster.check import plain
from clipcluster.recipe.load import recipe_keys, settings_keys
from clipcluster.recipe.plan import usable_nodes
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.runs.folder import Run
from jobs import submissions
from jobs.submit import parameters, snapshot
from jobs.submit.wanted import Wanted
from tools.slurm import Slurm


@dataclass(frozen=True)
class Prepared:
    """A run whose folder is ready for a launch; `made`: just now, and gone again if SLURM refuses its job."""

    run: Run
    recipe: Recipe
    code: Path
    grace: float
    made: bool

    def used(self, granted: int) -> int:
        """How many of the granted nodes take part."""
        return usable_nodes(self.recipe, granted)

    def undo(self) -> None:
        """Remove the folder again where it was made for this launch."""
        if self.made:
            shutil.rmtree(self.run.path, ignore_errors=True)


def grace_of(recipe: Recipe, chosen: str) -> float:
    """Seconds from the signal to the kill; SLURM is asked where the run goes there."""
    return parameters.grace_seconds(recipe.cluster, Slurm() if chosen == "slurm" else None)


def folder_alone(run: Run, checked: plain.Checked, wanted: Wanted, fetched: Path) -> None:
    """Make or update the run's folder, for somebody who starts it by other means."""
    settings = _settings(checked, "none", wanted, grace_of(checked.recipe, "none"))
    if run.exists():
        run.update_settings(settings)
    else:
        Run.create(run.path, recipe_keys(checked.loaded), settings, assets=fetched)
    wanted.say(f"{run.name}: made, and nothing started. Train it with one of:")
    wanted.say(f"  clipcluster train {run.path}")
    wanted.say(f"  torchrun --nproc-per-node={checked.world_size} -m jobs.cli train {run.path}")


def prepare(
    run: Run,
    checked: plain.Checked,
    chosen: str,
    wanted: Wanted,
    fetched: Path,
    *,
    grace: float,
    like: Path | None = None,
) -> Prepared:
    """Make or update the run's folder, with the assets in `fetched`, and the code; `like` as of `take`.

    A new folder does not outlive an error. Raises UserError.
    """
    settings = _settings(checked, chosen, wanted, grace)
    made = not run.exists()
    if made:
        Run.create(run.path, recipe_keys(checked.loaded), settings, assets=fetched)
    try:
        code = snapshot.take(run.path, like)
        last = submissions.submissions(run)[-1:]
        if last and last[0].get("code") != code.name:
            wanted.say(f"the code differs from the last submission's: {code.name}")
        run.update_settings({**settings, "code": code.name})
    except BaseException:
        if made:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    return Prepared(run, checked.recipe, code, grace, made)


def _settings(checked: plain.Checked, chosen: str, wanted: Wanted, grace: float) -> dict[str, Any]:
    keys = settings_keys(checked.loaded)
    return {
        **keys,
        # what the ranks have for a save, found here because only here SLURM is asked
        "cluster": {**keys["cluster"], "grace": f"{grace:g} s"},
        # for `status`; the attempts plan for themselves, with the nodes that they are given
        "plan": {"total_steps": checked.plan.total_steps if checked.plan else None},
        "after": wanted.after_runs,
        "executor": chosen,
        "code": None,
        "evaluator": wanted.evaluator,
    }
