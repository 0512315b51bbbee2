"""The run folder: its paths, what it is made of, and which attempt owns it."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.runs import files
from clipcluster.runs.attempts import Attempt

LISTED_SECONDS = 90.0
"""How long the listing of the attempts may lack one that exists: NFS keeps a listing for up to a minute."""
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


class AlreadyOwned(UserError):
    """Another job, `job_id`, owns the run and still runs."""

    def __init__(self, run: str, job_id: str, attempt: int, host: str) -> None:
        super().__init__(
            f"{run} is owned by job {job_id} (attempt {attempt}, on {host}), which still runs. "
            f"Wait for it, or end it first: clipcluster cancel {run}"
        )
        self.job_id = job_id


class Run:
    """One run's folder. Making the object touches nothing."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self.name = self.path.name
        self.recipe_file = self.path / "recipe.yaml"
        self.settings_file = self.path / "settings.yaml"
        self.attempts_dir = self.path / "attempts"
        self.checkpoints = self.path / "checkpoints"
        self.evals = self.path / "evals"
        self.marks = self.path / "marks"
        self.assets = self.path / "assets"
        self.submitit = self.path / "submitit"
        self.tensorboard = self.path / "tensorboard"

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @classmethod
    def create(
        cls,
        path: Path,
        recipe: Mapping[str, Any],
        settings: Mapping[str, Any],
        *,
        assets: Path | None = None,
    ) -> Run:
        """Make the folder, with `recipe.yaml`, `settings.yaml` and a copy of `assets`, or not at all.

        Raises FileExistsError where the run exists already, for example made by a submit at the same moment.
        """
        run = cls(path)
        run.path.parent.mkdir(parents=True, exist_ok=True)
        aside = cls(run.path.parent / f".{run.name}.{secrets.token_hex(4)}.tmp")
        aside.path.mkdir()
        try:
            files.write_yaml(aside.recipe_file, recipe)
            files.write_yaml(aside.settings_file, settings)
            for folder in (aside.attempts_dir, aside.checkpoints, aside.evals, aside.marks, aside.assets):
                folder.mkdir()
            if assets:
                shutil.copytree(assets, aside.assets, dirs_exist_ok=True)
            _rename_new(aside.path, run.path)
        except BaseException:
            shutil.rmtree(aside.path, ignore_errors=True)
            raise
        return run

    def exists(self) -> bool:
        return self.recipe_file.is_file()

    def recipe(self) -> dict[str, Any]:
        """The mapping in `recipe.yaml`: the result keys, as they were written at the first submission."""
        return files.read_yaml(self.recipe_file)

    def settings(self) -> dict[str, Any]:
        """The mapping in `settings.yaml`: speed and record keys as last submitted."""
        return files.read_yaml(self.settings_file)

    def update_settings(self, settings: Mapping[str, Any]) -> None:
        """Replace `settings.yaml`; attempts already claimed keep their own copy."""
        files.write_yaml(self.settings_file, settings)

    def attempts(self) -> list[Attempt]:
        """All attempts, the oldest first."""
        try:
            names = os.listdir(self.attempts_dir)
        except FileNotFoundError:
            return []
        numbers = sorted(int(name) for name in names if _NUMBER.fullmatch(name))
        return [Attempt(self.attempts_dir / str(number)) for number in numbers]

    def newest(self) -> Attempt | None:
        """The attempt that owns the run, or None before the first."""
        attempts = self.attempts()
        return attempts[-1] if attempts else None

    def attempt(self, number: int) -> Attempt:
        """Attempt `number`. Raises UserError where it does not exist."""
        found = Attempt(self.attempts_dir / str(number))
        if not found.path.is_dir():
            there = ", ".join(str(attempt.number) for attempt in self.attempts()) or "none"
            raise UserError(f"{self.name} has no attempt {number}; there are: {there}.")
        return found

    def claim(
        self, job_id: str, *, host: str, still_running: Callable[[str], bool], began: float | None = None
    ) -> Attempt:
        """Become the run's owner: make the next attempt, with `claim.json` and the settings in force.

        began: when the job was given its nodes, where that is known (seconds since 1970).

        Claims only where the newest attempt is this job's own, or its job no longer runs. Of several that
        claim at once one succeeds. Whether the run is finished or cancelled is for the caller to ask before.

        Raises AlreadyOwned, naming the job; FileExistsError where the listing never shows which was first.
        """
        self.attempts_dir.mkdir(exist_ok=True)
        deadline = None
        while True:
            newest = self.newest()
            owner = newest.claim() if newest else {}
            if newest and owner.get("job") not in (None, job_id) and still_running(owner["job"]):
                raise AlreadyOwned(
                    self.name, owner["job"], newest.number, owner.get("host", "an unknown host")
                )
            try:
                return self._claim_number(newest.number + 1 if newest else 1, job_id, host, began)
            except FileExistsError:
                deadline = deadline or time.monotonic() + LISTED_SECONDS
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)  # another job was first: look at which

    def _claim_number(self, number: int, job_id: str, host: str, began: float | None) -> Attempt:
        # Made aside and renamed, so that no attempt is ever seen without its claim. As with mkdir one caller
        # alone succeeds: rename(2) replaces no folder that holds a file.
        aside = self.attempts_dir / f".{number}.{secrets.token_hex(4)}.tmp"
        aside.mkdir()
        try:
            claim = {"job": job_id, "host": host, "time": round(time.time(), 3), "attempt": number}
            claim |= {} if began is None else {"began": began}
            files.write_json(aside / "claim.json", claim, private=True)
            files.write_bytes(aside / "settings.yaml", self.settings_file.read_bytes())
            _rename_new(aside, self.attempts_dir / str(number))
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return Attempt(self.attempts_dir / str(number))

    def finished(self) -> bool:
        """Whether the newest attempt ended with the run finished."""
        newest = self.newest()
        outcome = newest.outcome() if newest else None
        return outcome is not None and outcome["outcome"] == "finished"

    def cancelled_jobs(self) -> set[str]:
        """The job ids that `marks/cancelled` binds."""
        try:
            return set((self.marks / "cancelled").read_text(errors="replace").split())
        except FileNotFoundError:
            return set()

    def mark_cancelled(self, job_ids: Collection[str]) -> None:
        """Bind jobs to end for good: none of their attempts is followed by another. Durable on return."""
        new = [job for job in dict.fromkeys(job_ids) if job not in self.cancelled_jobs()]
        if new:
            self.marks.mkdir(exist_ok=True)
            # The command and the batch script may both mark: an append loses neither.
            files.append_text(self.marks / "cancelled", "".join(f"{job}\n" for job in new), durable=True)
            files.fsync_folder(self.marks)


def _rename_new(source: Path, target: Path) -> None:
    """Rename a folder that holds files to a name that no folder with files has. Raises FileExistsError."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, "exists already", str(target)) from error
        raise
    files.fsync_folder(target.parent)
