"""What `clipcluster status` prints: a table that reads at a glance, and where the time of a run went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from clipcluster.text import counted, shortened
from jobs.accounting import ALLOCATED, KINDS, WAITING
from jobs.status import groups, together


class _Column(NamedTuple):
    """A column of `clipcluster status`. drop: the largest goes first where a terminal is narrow; 0 stays."""

    name: str
    cell: Callable[[Mapping[str, Any]], str]
    right: bool = True
    drop: int = 0


_STATUS = (
    _Column("run", lambda one: one["label"], right=False),
    _Column("state", lambda one: _state(one, ended_shown=True), right=False),
    _Column("job", lambda one: _job(one), right=False, drop=4),
    _Column("attempts", lambda one: _figure(one["attempt"]), drop=6),
    _Column("step", lambda one: _progress(one)),
    _Column("loss", lambda one: _figure(one["loss"], ".4f"), drop=5),
    _Column("samples/s", lambda one: _figure(one["samples_per_second"], ",.0f"), drop=8),
    _Column("data wait", lambda one: _figure(one["data_wait"], ".0%"), drop=9),
    _Column("left", lambda one: span(one["seconds_left"]), drop=2),
    _Column("saved", lambda one: span(_since(one["checkpoint_time"]), " ago"), drop=3),
    _Column("lost", lambda one: span(one["lost_seconds"] or None), drop=10),
    _Column("goodput", lambda one: _figure(one["goodput"], ".1%"), drop=1),
    _Column("last ended", lambda one: _ended(one), right=False, drop=7),
)


def status_table(found: Sequence[Mapping[str, Any]], width: int | None = None) -> Table:
    """One line a run; those of a sweep below a line for all of them, evaluations below their runs.

    width: of the terminal, in characters; columns that do not fit are left out, the least important first.
    """
    rows = list(_rows(found))
    cells = {column: [column.cell(row) for row in rows] for column in _STATUS}
    needs = {
        column: min(_FOLDED.get(column.name, 10_000), max([len(column.name), *map(len, texts)]))
        for column, texts in cells.items()
    }
    while width is not None and sum(needs.values()) + len(needs) - 1 > width:
        least = max(needs, key=lambda one: one.drop)
        if not least.drop:
            break
        del needs[least]
    if not any(column.name == "last ended" for column in needs):
        cells[_STATUS[1]] = [_state(row, ended_shown=False) for row in rows]
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    parts = list(_parts(needs))
    for columns in parts:
        fold = columns[0].name in _FOLDED
        table.add_column(
            _aligned(columns, needs, [column.name for column in columns]),
            no_wrap=not fold,
            overflow="fold",
            width=None if fold else sum(needs[column] for column in columns) + len(columns) - 1,
            min_width=len("COMPLETING") if fold else None,
        )
    for number, row in enumerate(rows):
        style = "" if "name" in row else "bold"
        texts = (_aligned(columns, needs, [cells[column][number] for column in columns]) for columns in parts)
        table.add_row(*(Text(text, style) for text in texts))
    return table


def _parts(columns: Iterable[_Column]) -> Iterator[Sequence[_Column]]:
    """Columns that are one for rich, whose time goes by the cells: neighbours, but for those that fold."""
    for fold, neighbours in groupby(columns, key=lambda column: column.name in _FOLDED):
        found = list(neighbours)
        yield from ([one] for one in found) if fold else [found]


def _aligned(columns: Sequence[_Column], widths: Mapping[_Column, int], texts: Sequence[str]) -> str:
    """Texts of columns of these widths side by side; of a column that folds, its own as it is."""
    if columns[0].name in _FOLDED:
        return texts[0]
    padded = zip(columns, texts, strict=True)
    return " ".join(
        text.rjust(widths[column]) if column.right else text.ljust(widths[column]) for column, text in padded
    )


_FOLDED = {"state": 22, "last ended": 18}  # columns that may take several lines, and what they should have
_NOTHING = dict.fromkeys(
    (
        *("detail", "job", "attempt", "step", "total_steps", "loss", "samples_per_second", "data_wait"),
        *("seconds_left", "checkpoint_time", "lost_seconds", "goodput", "ended", "ended_reason"),
    )
)


def _rows(found: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """What each line of the table says, under the names of a report; `label` is its first column."""
    for sweep, members in groups(found):
        if sweep:
            whole = together(members)
            states = ", ".join(f"{count} {name}" for name, count in whole["states"].items())
            yield {**_NOTHING, **whole, "label": f"sweep {sweep}", "state": states}
        for one in members:
            yield {**one, "label": f"  {one['name']}" if sweep else one["name"]}
            for owed in one["evaluations"]:
                label = f"  evaluation of step {owed['step']:,}"
                yield {**_NOTHING, **owed, "label": label, "name": label, "step": None}


def breakdown(one: Mapping[str, Any]) -> list[str]:
    """Where the time of a run went, in lines: of the allocated device-seconds the largest part first."""
    spent, whole = one["device_seconds"], sum(one["device_seconds"][kind] for kind in ALLOCATED)
    lines = []
    if whole:
        parts = sorted((kind for kind in ALLOCATED if spent[kind] > 0), key=lambda kind: -spent[kind])
        shares = [f"{KINDS[kind]} {spent[kind] / whole:.1%}" for kind in parts]
        lines.append(f"of {whole / 3600:,.2f} device-hours: {', '.join(shares)}")
    waited = [f"{KINDS[kind]} {span(one['seconds'][kind])}" for kind in WAITING if one["seconds"][kind] >= 1]
    if waited:
        lines.append(", ".join(waited))
    if one["lost_steps"]:
        lines.append(f"{counted(one['lost_steps'], 'step')} lost: no checkpoint had saved them")
    if one["ended_reason"]:
        reason = " ".join(one["ended_reason"].split())
        lines.append(f"last ended: {one['ended']}" + (f" ({reason})" if reason != one["ended"] else ""))
    return lines


def _progress(one: Mapping[str, Any]) -> str:
    total = one["total_steps"]
    step = 0 if total and one["step"] is None else one["step"]
    return _figure(step) + (f"/{total:,}" if total else "")


def _ended(one: Mapping[str, Any]) -> str:
    """How the last attempt that ended did; of a failure, why."""
    ending, reason = one["ended"] or "", " ".join((one["ended_reason"] or "").split())
    return f"{ending}: {shortened(reason, 60)}" if ending in ("failed", "crashed") and reason else ending


def _since(moment: float | None) -> float | None:
    return None if moment is None else max(0.0, time.time() - moment)


def _job(report: Mapping[str, Any]) -> str:
    job = report["job"] or ""
    return "local" if job.startswith("local-") else job


def _state(report: Mapping[str, Any], *, ended_shown: bool) -> str:
    """The state and, in few words, why, unless that is told elsewhere; of a failure always somewhere."""
    detail, reason = (" ".join((report.get(name) or "").split()) for name in ("detail", "ended_reason"))
    told = detail == reason and (ended_shown or report["state"] != "FAILED")
    return f"{report['state']} ({shortened(detail, 100)})" if detail and not told else str(report["state"])


def span(seconds: float | None, after: str = "") -> str:
    """A length of time in one unit, in two digits or more: 90 s, 119 min, 47 h, 3 d; empty for None."""
    if seconds is None:
        return ""
    for name, size, least in (("d", 86400, 2), ("h", 3600, 2), ("min", 60, 2)):
        if seconds >= least * size:
            return f"{seconds // size:,.0f} {name}{after}"
    return f"{max(0.0, seconds):.0f} s{after}"


def _figure(value: float | None, form: str = ",") -> str:
    """A number in this format; empty where there is none."""
    return "" if value is None else format(value, form)
