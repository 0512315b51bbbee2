"""A run's metrics over all its attempts: a table, CSV, JSON lines, a plot in the terminal or as a picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from rich.table import Table

from clipcluster.errors import UserError
from clipcluster.runs.files import NON_FINITE, finite, require_writable
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics
from clipcluster.runs.names import as_typed
from clipcluster.text import nearest

BEFORE_ALL = ("step", "samples", "epoch", "loss")
AFTER_ALL = (NON_FINITE, "time", "attempt")
SHOWN = ("step", "epoch", "loss", "lr", "logit_scale", "samples_per_second", "data_wait_seconds", "attempt")
ROWS = 40  # of a table that nobody said more of
WIDTH, HEIGHT = 72, 14  # of a plot, in characters
Lines = list[dict[str, Any]]


def lines_of(run: Run, *, every: int | None = None) -> Lines:
    """One line a step; with `every` those of whole multiples of it, the first and the last.

    Raises UserError where there are none yet.
    """
    lines = [finite(line) for line in merged_metrics(run)]
    if not lines:
        raise UserError(f"{run.name} has no metrics yet; see: clipcluster status {as_typed(run)}")
    if every is None:
        return lines
    ends = (lines[0]["step"], lines[-1]["step"])
    return [line for line in lines if line["step"] % every == 0 or line["step"] in ends]


def usual(lines: Lines) -> list[str]:
    """The columns of a table for which nobody named any."""
    return [name for name in SHOWN if any(name in line for line in lines)]


def columns(lines: Lines, wanted: Sequence[str] = ()) -> list[str]:
    """The `wanted` keys, else every key that a line has: the step first, bookkeeping last.

    Raises UserError for a key that no line has.
    """
    keys = dict.fromkeys(key for line in lines for key in line)
    between = [key for key in keys if key not in (*BEFORE_ALL, *AFTER_ALL)]
    there = [key for key in (*BEFORE_ALL, *between, *AFTER_ALL) if key in keys]
    for name in wanted:
        if name not in keys:
            near = nearest(name, there)
            hint = f"did you mean {near}? " if near else ""
            raise UserError(f"--columns {name}: no such column; {hint}there are: {', '.join(there)}")
    return list(wanted) or there


def write(lines: Lines, names: Sequence[str], out: IO[str], *, kind: str) -> None:
    """The columns `names` as "csv" or "jsonl"."""
    chosen: Lines = [{name: line[name] for name in names if name in line} for line in lines]
    if kind == "jsonl":
        for line in chosen:
            out.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        return
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(chosen)


def thinned(lines: Lines) -> Lines:
    """About ROWS of the lines, evenly spaced, the first and the last among them."""
    if len(lines) <= ROWS:
        return lines
    return [lines[round(row * (len(lines) - 1) / (ROWS - 1))] for row in range(ROWS)]


def cell(name: str, value: Any) -> str:
    """A value for a person."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if name == "epoch":
        return f"{value:.2f}"
    if name.endswith("_per_second"):
        return f"{value:,.0f}"
    return f"{value:.4g}" if 0 < abs(value) < 1e-3 else f"{value:,.4f}"


def table(lines: Lines, names: Sequence[str]) -> Table:
    """One row a line."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        made.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        made.add_row(*(cell(name, line.get(name)) for name in names))
    return made


def curves(lines: Lines, names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each column to plot (default: the loss), without what is not finite.

    Raises UserError for a column without numbers.
    """
    chosen = [name for name in columns(lines, names) if name != "step"] if names else ["loss"]
    found = {}
    for name in columns(lines, chosen):
        values = [(line["step"], line.get(name)) for line in lines]
        found[name] = [(step, float(value)) for step, value in values if isinstance(value, (int, float))]
        if not found[name]:
            raise UserError(f"--columns {name}: it has no numbers to plot")
    return found


def terminal_plot(name: str, curve: Sequence[tuple[int, float]]) -> list[str]:
    """A curve as lines of text: the mean of each column of characters, the values at the left."""
    first, last = curve[0][0], curve[-1][0]
    buckets: dict[int, list[float]] = {}
    for step, value in curve:
        buckets.setdefault((step - first) * (WIDTH - 1) // max(1, last - first), []).append(value)
    means = {column: math.fsum(values) / len(values) for column, values in buckets.items()}
    low, high = min(means.values()), max(means.values())
    rows = [[" "] * WIDTH for _ in range(HEIGHT)]
    for column, mean in means.items():
        rows[round((high - mean) / (high - low or 1.0) * (HEIGHT - 1))][column] = "•"
    labels = {0: f"{high:.4g}", HEIGHT - 1: f"{low:.4g}"}
    text = [f"{labels.get(number, ''):>10} ┤{''.join(row).rstrip()}" for number, row in enumerate(rows)]
    axis = f"{first:,}".ljust(WIDTH - len(f"{last:,}")) + f"{last:,}"
    return [f"{name}", *text, " " * 11 + "└" + "─" * WIDTH, " " * 12 + axis]


def picture(found: dict[str, list[tuple[int, float]]], title: str, file: Path) -> None:
    """The curves, one below the other, as a picture of the kind that the file's ending names.

    Raises UserError for another ending than .png, .pdf and .svg, and where it cannot be written.
    """
    require_writable("--picture", file, (".png", ".pdf", ".svg"))
    from matplotlib.figure import Figure

    page = Figure(figsize=(8, 2.6 * len(found)), layout="constrained")
    page.suptitle(title)
    for place, (name, curve) in enumerate(found.items(), 1):
        axes = page.add_subplot(len(found), 1, place)
        axes.plot(*zip(*curve, strict=True), linewidth=1)
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
    page.savefig(file, dpi=110)
