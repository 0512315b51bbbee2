"""The run folder: its paths, its name, who owns it, and finding it again."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clipcluster.errors import UserError
from clipcluster.runs import files
from clipcluster.runs.attempts import Attempt

FORMAT = 1  # of the run folder; part of every run's name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_RUN_NAME = re.compile(r"(?P<name>.+)-[0-9a-f]{8}")


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
    def create(cls, path: Path, recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> Run:
        """Make the folder whole, with `recipe.yaml` and `settings.yaml`, or not at all.

        Raises FileExistsError where the run exists already, for example made by a submit at the same moment.
        """
        run = cls(path)
        run.path.parent.mkdir(parents=True, exist_ok=True)
        aside = cls(run.path.parent / f".{run.name}.{secrets.token_hex(4)}.tmp")
        aside.path.mkdir()
        try:
            files.write_text(aside.recipe_file, _yaml(recipe))
            files.write_text(aside.settings_file, _yaml(settings))
            for folder in (aside.attempts_dir, aside.checkpoints, aside.evals, aside.marks, aside.assets):
                folder.mkdir()
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
        files.write_text(self.settings_file, _yaml(settings))

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

    def claim(self, job_id: str, *, host: str, still_running: Callable[[str], bool]) -> Attempt:
        """Become the run's owner: make the next attempt, with `claim.json` and the settings in force.

        Claims only where the newest attempt is this job's own, or its job no longer runs. Of several that
        claim at once one succeeds. Whether the run is finished or cancelled is for the caller to ask before.

        Raises AlreadyOwned, naming the job.
        """
        self.attempts_dir.mkdir(exist_ok=True)
        while True:
            newest = self.newest()
            owner = newest.claim() if newest else {}
            if newest and owner.get("job") not in (None, job_id) and still_running(owner["job"]):
                raise AlreadyOwned(
                    self.name, owner["job"], newest.number, owner.get("host", "an unknown host")
                )
            try:
                return self._claim_number(newest.number + 1 if newest else 1, job_id, host)
            except FileExistsError:
                continue  # somebody else was first: look at who it is

    def _claim_number(self, number: int, job_id: str, host: str) -> Attempt:
        # Made aside and renamed, so that no attempt is ever seen without its claim. As with mkdir one caller
        # alone succeeds: rename(2) replaces no folder that holds a file.
        aside = self.attempts_dir / f".{number}.{secrets.token_hex(4)}.tmp"
        aside.mkdir()
        try:
            claim = {"job": job_id, "host": host, "time": round(time.time(), 3), "attempt": number}
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


class _Dumper(yaml.SafeDumper):
    """Writes every text so that reading gives it back."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML writes these line breaks as they are, and reads each as a space
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _yaml(mapping: Mapping[str, Any]) -> str:
    return yaml.dump(dict(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def run_name(name: str, result: Mapping[str, Any]) -> str:
    """NAME-8hex: the start of the SHA-256 over the canonical JSON of `result` and the folder's format number.

    `result` holds the result keys that differ from their defaults, nested or dotted: a new key with a default
    changes no old run's name. Raises UserError for a NAME that would not do as a folder's.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"name: {name!r} cannot name a folder. Allowed are letters, digits and . _ + = -, "
            "beginning with a letter or digit."
        )
    content = {"format": FORMAT, "result": _nested(result)}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return f"{name}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested value by dotted path, numbers stepping into lists."""
    if isinstance(value, Mapping) and (value or not prefix):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, (list, tuple)) and value:
        items = [(str(place), inner) for place, inner in enumerate(value)]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat.update(_flat(inner, f"{prefix}.{key}" if prefix else key))
    return flat


def _nested(value: Any) -> Any:
    """The value with string keys and plain containers, so that JSON sorts it in one way alone."""
    if isinstance(value, Mapping):
        return {str(key): _nested(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nested(inner) for inner in value]
    return value


@dataclass(frozen=True)
class Difference:
    """A result key whose value differs; None stands for a key that is not given."""

    key: str
    here: Any
    there: Any


@dataclass(frozen=True)
class Twin:
    """A run of the same NAME that differs in a few result keys."""

    run: Run
    differences: list[Difference]


def near_twins(name: str, recipe: Mapping[str, Any], folder: Path, *, at_most: int = 3) -> list[Twin]:
    """Runs named NAME-8hex in `folder` whose result keys differ from `recipe` in 1 to `at_most` places.

    `recipe` is the mapping that `recipe.yaml` would hold; the key `name` is not compared. The nearest first.
    """
    here = _flat({key: value for key, value in recipe.items() if key != "name"})
    twins = []
    for run in all_runs(folder):
        match = _RUN_NAME.fullmatch(run.name)
        if match is None or match["name"] != name:
            continue
        there = _flat({key: value for key, value in run.recipe().items() if key != "name"})
        differences = [
            Difference(key, here.get(key), there.get(key))
            for key in sorted({*here, *there})
            if here.get(key) != there.get(key)
        ]
        if 1 <= len(differences) <= at_most:
            twins.append(Twin(run, differences))
    return sorted(twins, key=lambda twin: (len(twin.differences), twin.run.name))


def runs_folder(option: Path | None = None) -> Path:
    """Where runs live: `option` (--runs), else $CLIPCLUSTER_RUNS, else ./runs."""
    if option is not None:
        return Path(option)
    return Path(os.environ.get("CLIPCLUSTER_RUNS") or "runs")


def all_runs(folder: Path) -> list[Run]:
    """Every run in `folder`, by name; none where there is no such folder."""
    if not folder.is_dir():
        return []
    runs = (Run(path) for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return [run for run in runs if run.exists()]


def find_run(text: str, folder: Path) -> Run:
    """The run that `text` means: a run's folder, its name in `folder`, or a unique beginning of the name.

    Raises UserError, listing what is there.
    """
    for path in (Path(text), folder / text) if text else ():
        if Run(path).exists():
            return Run(path)
    runs = all_runs(folder)
    fitting = [run for run in runs if text and run.name.startswith(text)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(
            f"{text!r} is the beginning of several runs in {folder}: {_names(fitting)}. Give more of it."
        )
    if not runs:
        raise UserError(
            f"There is no run {text!r}, and no run at all in {folder}. Name another folder with --runs or "
            "$CLIPCLUSTER_RUNS, or make a run with: clipcluster submit RECIPE"
        )
    raise UserError(
        f"There is no run {text!r}. Give a run's folder, its name, or a unique beginning of the name; "
        f"in {folder} there are: {_names(runs)}."
    )


def _names(runs: list[Run]) -> str:
    shown = [run.name for run in runs[:12]]
    return ", ".join(shown) + (f" and {len(runs) - 12} more" if len(runs) > 12 else "")
