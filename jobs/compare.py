"""The members of a sweep beside each other: what differs in them and their last metrics, the best first."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from rich.table import Table

from clipcluster.errors import UserError
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics
from clipcluster.runs.sweeps import membership
from clipcluster.text import nearest
from clipcluster.train.rotation import smaller_is_better
from jobs.metrics import cell
from jobs.metrics import write as write_lines

ABOUT = ("run", "step")


@dataclass(frozen=True)
class Row:
    """A member: what differs in it, and the last value of every metric that it logged."""

    run: Run
    values: dict[str, Any]
    metrics: dict[str, Any]

    def figure(self, metric: str) -> float | None:
        """The last value, None where there is none that is finite."""
        value = self.metrics.get(metric)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            return None
        return float(value)

    def columns(self, names: Sequence[str]) -> dict[str, Any]:
        """The row with these metrics, for a table."""
        chosen = {name: self.metrics.get(name) for name in names}
        return {"run": self.run.name, **self.values, "step": self.metrics.get("step"), **chosen}


def rows(runs: Sequence[Run]) -> list[Row]:
    """One row a member, in the order of `runs`."""
    return [Row(run, (membership(run) or {"values": {}})["values"], _last(run)) for run in runs]


def _last(run: Run) -> dict[str, Any]:
    last: dict[str, Any] = {}
    for line in merged_metrics(run):
        last.update(line)
    return last


def ranked(runs: Sequence[Run], metric: str) -> list[Row]:
    """The rows by a metric, the best first, those without it last. UserError where no member has it."""
    found = rows(runs)
    if all(row.figure(metric) is None for row in found):
        known = list(dict.fromkeys(_measured(found)))
        near = nearest(metric, known)
        hint = f"did you mean {near}? " if near else ""
        raise UserError(f"no member has logged {metric}; {hint}there are: {', '.join(known) or 'none yet'}")
    sign = 1.0 if smaller_is_better(metric) else -1.0

    def place(row: Row) -> float:
        figure = row.figure(metric)
        return math.inf if figure is None else sign * figure

    return sorted(found, key=place)


def _measured(found: Sequence[Row]) -> Iterator[str]:
    for row in found:
        yield from (name for name in row.metrics if name != "step" and row.figure(name) is not None)


def usual(found: Sequence[Row]) -> list[str]:
    """The metrics of a table for which nobody named any: the loss, and what evaluations measured."""
    measured = dict.fromkeys(name for name in _measured(found) if "/" in name)
    return ["loss", *list(measured)[:6]]


def chosen(found: Sequence[Row], names: Sequence[str]) -> list[str]:
    """The metrics among `names`, for the rest of a row is always shown. UserError for what no member has."""
    always = {*ABOUT, *(key for row in found for key in row.values)}
    metrics = dict.fromkeys(name for row in found for name in row.metrics)
    for name in names:
        if name not in always and name not in metrics:
            near = nearest(name, list(metrics))
            hint = f"did you mean {near}? " if near else ""
            there = ", ".join(metrics) or "none yet"
            raise UserError(f"--columns {name}: no member has it; {hint}there are: {there}")
    return [name for name in dict.fromkeys(names) if name not in always]


def table(found: Sequence[Row], names: Sequence[str]) -> Table:
    """One line a member."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    keys = list(dict.fromkeys(key for row in found for key in row.values))
    for name in ("run", *keys, "step", *names):
        made.add_column(name, justify="left" if name == "run" else "right", no_wrap=name in ABOUT)
    for row in found:
        line = row.columns(names)
        made.add_row(
            row.run.name,
            *(_short(line.get(key)) for key in keys),
            cell("step", line["step"]),
            *(cell(name, line[name]) for name in names),
        )
    return made


def _short(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def write(found: Sequence[Row], names: Sequence[str], out: IO[str], *, kind: str) -> None:
    """The rows as "csv" or "jsonl"."""
    lines = [row.columns(names) for row in found]
    write_lines(lines, list(dict.fromkeys(key for line in lines for key in line)), out, kind=kind)
