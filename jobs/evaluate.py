"""The evaluations of a run: the last one, another of a checkpoint, and their results for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clipcluster.errors import UserError
from clipcluster.evals.headline import ordered
from clipcluster.runs import files
from clipcluster.runs.checkpoints import MANIFEST, is_complete, name_of, steps_in
from clipcluster.runs.folder import Run
from clipcluster.runs.names import find_run
from clipcluster.runtime.environment import share_cores


def evaluate(what: str, overrides: Sequence[str], runs: Path) -> dict[str, Any]:
    """The results document of a run's newest checkpoint, or of the one named by its folder.

    Measured in this process. Raises UserError where there is none.
    """
    folder = Path(what).absolute()
    run, checkpoint = Run(folder.parent.parent), folder if (folder / MANIFEST).is_file() else None
    if checkpoint is not None:
        if not run.exists():
            raise UserError(f"{what} lies in no run folder: {run.path} has no recipe.yaml")
    elif run.exists():
        names = [name_of(step) for step in steps_in(run.checkpoints)]
        whole = [name for name in names if is_complete(run.checkpoints / name)]
        raise UserError(f"{what} is not a complete checkpoint; {run.name} has {', '.join(whole) or 'none'}.")
    else:
        run = find_run(what, runs)
    from clipcluster import run as running

    share_cores()
    return running.evaluate(run, overrides=overrides, checkpoint=checkpoint)


def latest(run: Run) -> dict[str, Any] | None:
    """The document of the run's last evaluation, or None."""
    found = sorted(run.evals.glob("step-*.json"))
    return files.read_object(found[-1]) if found else None


def shown(document: Mapping[str, Any]) -> Group:
    """A document's results (SET/METRIC -> value) by kind, each with what it means; the headline first."""
    parts: list[Any] = [Text(f"evaluation at step {document['step']:,}", style="bold")]
    for kind, results in ordered(document["metrics"]).items():
        explanation = f" ({kind.explanation})" if kind.explanation else ""
        parts.append(Text.assemble((kind.title, "bold"), explanation))
        table = Table("set", "metric", box=None, pad_edge=False, show_header=False)
        table.add_column("value", justify="right")
        before = None
        for result in results:
            table.add_row("" if result.set == before else result.set, result.metric, result.text)
            before = result.set
        parts.append(Padding(table, (0, 0, 0, 2), expand=False))
    return Group(*parts)
