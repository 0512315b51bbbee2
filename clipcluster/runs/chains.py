"""Chains: what was submitted together with a run, before it and after it, by the name of its recipe.

RUNS/chains/NAME.json   {"conversions": [folder], "runs": [folder]}: in the order of their submission; runs as
                        seen from RUNS
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipcluster.runs import files
from clipcluster.runs.folder import Run

FOLDER = "chains"  # in the folder of runs


@dataclass(frozen=True)
class Chain:
    """The folders of conversions, and the runs, those of exports and evaluations among them."""

    conversions: list[Path]
    runs: list[Run]


def record(name: str, runs: Path, conversions: Sequence[Path], links: Sequence[Run]) -> None:
    """Write down what belongs to the chain `name`, beside what earlier submissions wrote."""
    known = find_chain(name, runs) or Chain([], [])
    root = runs.absolute()
    both = {
        "conversions": [str(path) for path in [*known.conversions, *conversions]],
        "runs": [os.path.relpath(run.path, root) for run in [*known.runs, *links]],
    }
    (runs / FOLDER).mkdir(parents=True, exist_ok=True)
    files.write_json(runs / FOLDER / f"{name}.json", {key: list(dict.fromkeys(both[key])) for key in both})


def find_chain(name: str, runs: Path) -> Chain | None:
    """The chain of this name; None where there is none."""
    if not name or "/" in name:
        return None
    found = files.read_object(runs / FOLDER / f"{name}.json", conversions=list, runs=list)
    if found is None:
        return None
    links = [Run(runs / path) for path in found["runs"]]
    return Chain([Path(path) for path in found["conversions"]], [run for run in links if run.exists()])


def chain_names(runs: Path) -> list[str]:
    """The names of all chains."""
    return [file.stem for file in (runs / FOLDER).glob("*.json")]


def runs_before(run: Run) -> list[Run]:
    """The runs that had not finished when this one was submitted, and that it waits for."""
    try:
        settings = run.settings()
    except FileNotFoundError:
        return []
    return [Run(path) for path in settings.get("after") or ()]
