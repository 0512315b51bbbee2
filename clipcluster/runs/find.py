"""Finding runs: where they live, and which one a person means."""

from __future__ import annotations

import os
from pathlib import Path

from clipcluster.errors import UserError
from clipcluster.runs.folder import Run


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
