"""Results of an evaluation for people: the headline first, every group of figures with what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clipcluster.evals.headline import Result, ordered
from clipcluster.runs import files
from clipcluster.runs.folder import Run


def latest(run: Run) -> dict[str, Any] | None:
    """The document of the run's last evaluation, or None."""
    found = sorted(run.evals.glob("step-*.json"))
    document: dict[str, Any] | None = files.read_json(found[-1]) if found else None
    return document


def shown(document: Mapping[str, Any]) -> Group:
    """A document's results (SET/METRIC -> value) by kind."""
    parts: list[Any] = [Text(f"evaluation at step {document['step']:,}", style="bold")]
    for kind, results in ordered(document["metrics"]).items():
        explanation = f" ({kind.explanation})" if kind.explanation else ""
        parts.append(Text.assemble((kind.title, "bold"), explanation))
        parts.append(Padding(_table(results), (0, 0, 0, 2)))
    return Group(*parts)


def _table(results: list[Result]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("set")
    table.add_column("metric")
    table.add_column("value", justify="right")
    before = None
    for result in results:
        table.add_row("" if result.set == before else result.set, result.metric, result.text)
        before = result.set
    return table
