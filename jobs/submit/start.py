"""From a checked recipe to a job: the run folder, the snapshot, the launch.

The launch is recorded before and after it happens, and no folder is removed that a job may be using.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.recipe.load import Loaded, recipe_keys, settings_keys
from clipcluster.recipe.plan import Plan, usable_nodes
from clipcluster.runs.folder import Run
from clipcluster.text import counted
from jobs import submissions
from jobs.state import Queue
from jobs.submit import executor, launch, snapshot
from jobs.submit.parameters import grace_seconds
from tools.slurm import Slurm


@dataclass(frozen=True)
class Start:
    """One run to start on "slurm" or "local", or to make the folder of ("none")."""

    run: Run
    loaded: Loaded
    plan: Plan
    executor: str
    trainee: str
    say: Callable[[str], None]

    def start(self, fetched: Path) -> str | None:
        """Make or update the folder, with the assets in `fetched`, and launch; returns the job's id.

        None where nothing was to be launched. A new folder does not outlive a refusal. Raises UserError.
        """
        run, cluster = self.run, self.loaded.recipe.cluster
        grace = grace_seconds(cluster, Slurm() if self.executor == "slurm" else None)
        made = not run.exists()
        if made:
            Run.create(run.path, recipe_keys(self.loaded), self._settings(None, grace), assets=fetched)
        if self.executor == "none":
            run.update_settings(self._settings(None, grace))
            self.say(f"{run.name}: made, and nothing started. Train it with one of:")
            self.say(f"  clipcluster train {run.path}")
            self.say(f"  torchrun --nproc-per-node={self.plan.world_size} -m jobs.cli train {run.path}")
            return None
        code = self._snapshot(grace, made)
        job = self._launch(code, grace, made)
        ranks = counted(cluster.ranks_per_node, "local rank")
        named = f"job {job}" if self.executor == "slurm" else ranks
        self.say(f"{run.name}: {counted(self.plan.total_steps, 'step')}, as {named}")
        self.say(executor.devices(cluster, self.executor))
        if self.executor == "local" and not launch.await_claim(run, job):
            self.say(
                f"{run.name}: its process has not claimed the run within {launch.START_SECONDS:g} s; "
                f"see {launch.local_log(run)}"
            )
        return job

    def _snapshot(self, grace: float, made: bool) -> Path:
        """The folder of the code that the job will run; the settings name it."""
        try:
            code = snapshot.take(self.run.path)
            if self.run.settings().get("code") not in (None, code.name):
                self.say(f"the code differs from the last submission's: {code.name}")
            self.run.update_settings(self._settings(code.name, grace))
        except BaseException:
            if made:
                shutil.rmtree(self.run.path, ignore_errors=True)
            raise
        return code

    def _launch(self, code: Path, grace: float, made: bool) -> str:
        """The job's id. The intent is recorded before, the job or the refusal after it.

        Only what SLURM refused leaves no folder behind: after any other failure the job may exist.
        """
        run, recipe = self.run, self.loaded.recipe
        intent = submissions.intend(run, self.executor, code.name)
        try:
            if self.executor == "local":
                job = launch.locally(recipe.cluster, run, code, grace=grace, trainee=self.trainee)
            else:
                job = launch.on_slurm(
                    recipe.cluster,
                    run,
                    code,
                    grace=grace,
                    trainee=self.trainee,
                    used=lambda granted: usable_nodes(recipe, granted),
                )
        except launch.NoAnswer as silence:
            found = Queue().jobs_of(run)
            if not found:
                raise UserError(
                    f"{run.name}: {silence}. Whether the job was accepted is not known: submit the run again "
                    "in a minute, which finds the job or queues a new one."
                ) from None
            job = found[-1]
        except UserError as refusal:
            submissions.record(run, intent, refused=str(refusal))
            if made:
                shutil.rmtree(run.path, ignore_errors=True)
            raise
        except BaseException:
            for job in Queue().jobs_of(run)[-1:] if self.executor == "slurm" else []:
                submissions.record(run, intent, job=job)
                self.say(f"{run.name} is queued, as job {job}; to end it: clipcluster cancel {run.name}")
            raise
        submissions.record(run, intent, job=job)
        return job

    def _settings(self, code: str | None, grace: float) -> dict[str, Any]:
        """What settings.yaml holds: the recipe's speed and record keys, paths, executor, code, and the steps
        for `status`; the attempts plan for themselves, with the nodes that they are given.

        `grace` (seconds) is what the ranks have for a save, found here because only here SLURM is asked.
        """
        keys = settings_keys(self.loaded)
        return {
            **keys,
            "cluster": {**keys["cluster"], "grace": f"{grace:g} s"},
            "plan": {"total_steps": self.plan.total_steps},
            "executor": self.executor,
            "code": code,
        }
