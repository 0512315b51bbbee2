"""A run's name, which its result keys decide, and finding runs by it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.runs.folder import Run
from clipcluster.text import did_you_mean

FORMAT = 1  # of the run folder; part of every run's name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_RUN_NAME = re.compile(r"(?P<name>.+)-[0-9a-f]{8}")


def run_name(name: str, result: Mapping[str, Any]) -> str:
    """NAME-8hex: the start of the SHA-256 over the canonical JSON of `result` and the folder's format number.

    `result` holds the result keys that differ from their defaults, nested or dotted: a new key with a default
    changes no old run's name. Raises UserError for a NAME that cannot name a folder.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"name: {name!r} cannot name a folder. Allowed are letters, digits and . _ + = -, "
            "beginning with a letter or digit."
        )
    content = {"format": FORMAT, "result": _nested(result)}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return f"{name}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested value by dotted path, numbers stepping into lists."""
    if isinstance(value, Mapping) and (value or not prefix):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, (list, tuple)) and value:
        items = [(str(number), inner) for number, inner in enumerate(value)]
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in items:
        found.update(flat(inner, f"{prefix}.{key}" if prefix else key))
    return found


def _nested(value: Any) -> Any:
    """The value with string keys and plain containers, so that JSON sorts it in one way alone."""
    if isinstance(value, Mapping):
        return {str(key): _nested(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nested(inner) for inner in value]
    return value


def similar_runs(
    name: str, recipe: Mapping[str, Any], folder: Path, *, at_most: int = 3
) -> list[tuple[Run, dict[str, tuple[Any, Any]]]]:
    """Runs named NAME-8hex in `folder` whose result keys differ from `recipe` in 1 to `at_most` of them.

    `recipe` is the mapping that `recipe.yaml` would hold; the key `name` is not compared. The nearest first,
    each with its differences: key -> (here, there), None for a key that is not given.
    """
    here = flat({key: value for key, value in recipe.items() if key != "name"})
    found = []
    for run in all_runs(folder):
        match = _RUN_NAME.fullmatch(run.name)
        if match is None or match["name"] != name:
            continue
        there = flat({key: value for key, value in run.recipe().items() if key != "name"})
        pairs = {key: (here.get(key), there.get(key)) for key in sorted({*here, *there})}
        differences = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        if 1 <= len(differences) <= at_most:
            found.append((run, differences))
    return sorted(found, key=lambda similar: (len(similar[1]), similar[0].name))


def runs_folder(option: Path | None = None) -> Path:
    """Where runs live: `option` (--runs), else $CLIPCLUSTER_RUNS, else ./runs."""
    if option is not None:
        return Path(option)
    return Path(os.environ.get("CLIPCLUSTER_RUNS") or "runs")


def as_typed(run: Run) -> str:
    """How the run is named on the command line: by its name where it lies in ./runs, else by its folder."""
    return run.name if runs_folder().absolute() == run.path.parent else str(run.path)


def all_runs(folder: Path) -> list[Run]:
    """Every run in `folder`, by name; none where there is no such folder. Raises UserError for a file."""
    if folder.is_file():
        raise UserError(
            f"{folder} is a file; runs lie in a folder: give one with --runs or $CLIPCLUSTER_RUNS"
        )
    if not folder.is_dir():
        return []
    runs = (Run(path) for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return [run for run in runs if _may_exist(run)]


def _may_exist(run: Run) -> bool:
    """Whether it is a run; of a folder into which this user may not look, its name says so."""
    try:
        return run.exists()
    except PermissionError:
        return _RUN_NAME.fullmatch(run.name) is not None


def find_run(text: str, folder: Path, *, groups: Sequence[str] = ()) -> Run:
    """The run that `text` means: a run's folder, its name in `folder`, or a unique beginning of the name.

    Raises UserError, listing what is there; `groups`: names of sweeps and chains, which are accepted too.
    """
    for path in (Path(text), folder / text) if text else ():
        if Run(path).exists():
            return Run(path)
    runs = all_runs(folder)
    fitting = [run for run in runs if text and run.name.startswith(text)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        several = _some([run.name for run in fitting])
        raise UserError(f"{text!r} is the beginning of several runs in {folder}: {several}. Give more of it.")
    if not runs:
        raise UserError(
            f"There is no run {text!r}, and no run at all in {folder}. Name another folder with --runs or "
            "$CLIPCLUSTER_RUNS, or make a run with: clipcluster submit RECIPE"
        )
    names = [run.name for run in runs]
    near = did_you_mean(text, [*groups, *names, *(name.rpartition("-")[0] for name in names)]) or "."
    also = f"; sweeps and chains: {_some(groups)}" if groups else ""
    raise UserError(
        f"There is no run {text!r}{near} Give a run's folder, its name, or a unique beginning of the name; "
        f"in {folder} there are: {_some(names)}{also}."
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
