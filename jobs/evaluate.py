"""The evaluations of a run: the last one, another of a checkpoint, and their results for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clipcluster.evals.headline import headline, ordered
from clipcluster.runs import files
from clipcluster.runs.folder import Run
from clipcluster.runtime.environment import share_cores


def evaluate(
    what: str, overrides: Sequence[str], runs: Path, weights: Literal["ema", "raw"] | None = None
) -> dict[str, Any]:
    """The results document of a run's newest checkpoint, of the one named by its folder, or of another model.

    Measured in this process, as `clipcluster.run.evaluate`. Raises UserError where there is none.
    """
    from clipcluster import run as running

    share_cores()
    return running.evaluate(what, overrides=overrides, weights=weights, runs=runs)


def latest(run: Run) -> dict[str, Any] | None:
    """The document of the run's last evaluation, or None."""
    found = sorted(run.evals.glob("step-*.json"))
    return files.read_object(found[-1]) if found else None


def shown(document: Mapping[str, Any], *, all_of_it: bool = False) -> Group:
    """A document's results (SET/METRIC -> value): the headline, or all by kind, each with what it means."""
    step = document["step"]
    of = f"at step {step:,}" if step is not None else f"of {document['checkpoint']}"
    title = Text(f"evaluation {of}", style="bold")
    if not all_of_it:
        return _headline(title, document["metrics"])
    parts: list[Any] = [title]
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


def _headline(title: Text, metrics: Mapping[str, Any]) -> Group:
    """The figures that a person reads first, and how many more there are."""
    table = Table("set", "kind", "metric", box=None, pad_edge=False, show_header=False)
    table.add_column("value", justify="right")
    chosen = headline(metrics)
    for before, result in zip([None, *chosen], chosen, strict=False):
        name = "" if before is not None and before.set == result.set else result.set
        table.add_row(name, result.kind.title, result.metric, result.text)
    parts: list[Any] = [title, Padding(table, (0, 0, 0, 2), expand=False)]
    if len(metrics) > len(chosen):
        parts.append(Text(f"  and {len(metrics) - len(chosen)} more: clipcluster evaluate … --all"))
    return Group(*parts)
