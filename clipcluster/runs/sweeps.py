"""Sweeps: runs that one recipe describes. The folder of each member names its sweep.

RUNS/NAME-LABEL-8hex/sweep.json   {"sweep": NAME, "values": {key: value}}: what differs in this member
RUNS/sweeps/NAME/submitit/        what the sweep's arrays of jobs are started from, and their logs
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipcluster.runs import files
from clipcluster.runs.chains import chain_names, find_chain
from clipcluster.runs.folder import Run
from clipcluster.runs.names import find_run, run_name

FILE = "sweep.json"
FOLDER = "sweeps"  # in the folder of runs


def join(run: Run, name: str, values: Mapping[str, Any]) -> None:
    """Make the run a member of the sweep `name`; `values` are the keys that differ in it."""
    document = {"sweep": name, "values": dict(values)}
    if membership(run) != document:
        files.write_json(run.path / FILE, document)


def membership(run: Run) -> dict[str, Any] | None:
    """`sweep` (its name) and `values` of a run that is a member of one; else None."""
    return files.read_object(run.path / FILE, sweep=str, values=dict)


def array_folder(name: str, runs: Path) -> Path:
    """Where the files of a sweep's arrays are, and those of its local queue."""
    return runs / FOLDER / name


def members(name: str, runs: Path) -> list[Run]:
    """The runs of a sweep, by name, numbers by their size."""
    found = (Run(path) for path in runs.glob(f"{name}-*"))
    mine = [run for run in found if (membership(run) or {}).get("sweep") == name]
    return sorted(mine, key=lambda run: _natural(run.name))


def _natural(text: str) -> list[tuple[float, str]]:
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", text)
    return [(float(part), "") if number % 2 else (0.0, part) for number, part in enumerate(parts)]


def find_sweep(text: str, runs: Path) -> tuple[str, list[Run]] | None:
    """The name and the members of the sweep that `text` names, by its name or its folder; else None."""
    path = Path(text)
    if path.parent.name == FOLDER and path.is_dir():
        text, runs = path.name, path.absolute().parent.parent
    if not text or "/" in text or not array_folder(text, runs).is_dir():
        return None
    found = members(text, runs)
    return (text, found) if found else None


def find_runs(text: str, runs: Path, *, chains: bool = False) -> list[Run]:
    """The runs of the sweep, with `chains` of the chain, that `text` names, else the one run that it means.

    UserError as `find_run`.
    """
    chain = find_chain(text, runs) if chains else None
    if chain is not None and chain.runs:
        return chain.runs
    sweep = find_sweep(text, runs)
    if sweep:
        return sweep[1]
    groups = {path.name for path in (runs / FOLDER).glob("*") if find_sweep(path.name, runs)}
    if chains:
        groups |= {name for name in chain_names(runs) if (one := find_chain(name, runs)) and one.runs}
    return [find_run(text, runs, groups=sorted(groups))]


def run_of(
    name: str, title: str, result: Mapping[str, Any], runs: Path, values: Mapping[str, Any] | None = None
) -> Run:
    """The run of these result keys: TITLE-8hex, or one of the recipe `name` that was called otherwise.

    A sweep with one more key calls its members otherwise, and so does a recipe without its sweep. `values`: a
    member's, in none of which that run differs as a member.
    """
    run = Run(runs / run_name(title, result))
    if run.exists():
        return run
    digits = run.name[-8:]
    paths = [*runs.glob(f"{name}-{digits}"), *runs.glob(f"{name}-*-{digits}")]
    others = [other for other in map(Run, paths) if other.exists() and other.settings().get("name") == name]
    if len(others) != 1:
        return run
    theirs = (membership(others[0]) or {"values": {}})["values"]
    same = all(theirs.get(key, value) == value for key, value in (values or {}).items())
    return others[0] if same else run
