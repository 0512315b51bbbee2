"""Chains: what was submitted together with a run, before it and after it, by the name of its recipe.

RUNS/chains/NAME.json   {"conversions": [folder], "runs": [folder]}: in the order in which they go
"""

from __future__ import annotations

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
    """Write down what belongs to the chain `name`, in place of what an earlier submission wrote."""
    document = {
        "conversions": [str(path) for path in conversions],
        "runs": [str(run.path) for run in links],
    }
    (runs / FOLDER).mkdir(parents=True, exist_ok=True)
    files.write_json(runs / FOLDER / f"{name}.json", document)


def find_chain(name: str, runs: Path) -> Chain | None:
    """The chain of this name; None where there is none."""
    if not name or "/" in name:
        return None
    found = files.read_object(runs / FOLDER / f"{name}.json", conversions=list, runs=list)
    if found is None:
        return None
    links = [Run(path) for path in found["runs"]]
    return Chain([Path(path) for path in found["conversions"]], [run for run in links if run.exists()])
