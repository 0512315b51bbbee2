"""Tables for people."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def status_table(reports: Sequence[Mapping[str, Any]]) -> Table:
    """One line a run: state, progress, and when something last happened."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("run", no_wrap=True)
    table.add_column("state", overflow="fold", min_width=len("CANCELLED"))
    table.add_column("job", overflow="fold")
    for name in ("attempt", "step", "loss", "samples/s", "saved"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("last event", overflow="fold", min_width=6)
    for report in reports:
        table.add_row(
            report["name"],
            state_text(report),
            "local" if (report["job"] or "").startswith("local-") else report["job"] or "",
            _number(report["attempt"]),
            _steps(report),
            "" if report["loss"] is None else f"{report['loss']:.4f}",
            "" if report["samples_per_second"] is None else f"{report['samples_per_second']:,.0f}",
            _number(report["checkpoint"]),
            _event(report),
        )
    return table


def state_text(report: Mapping[str, Any]) -> str:
    """The state and, in few words, why."""
    detail = " ".join(report["detail"].split())
    short = detail if len(detail) <= 100 else detail[:99] + "…"
    return f"{report['state']} ({short})" if detail else str(report["state"])


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _steps(report: Mapping[str, Any]) -> str:
    if report["step"] is None and report["total_steps"] is None:
        return ""
    return f"{report['step'] or 0:,}" + (f"/{report['total_steps']:,}" if report["total_steps"] else "")


def _event(report: Mapping[str, Any]) -> str:
    if report["last_event"] is None:
        return ""
    ago = "" if report["last_event_time"] is None else f" {age(time.time() - report['last_event_time'])} ago"
    return f"{report['last_event'].replace('_', ' ')}{ago}"


def age(seconds: float) -> str:
    """A span in the largest unit that it fills: 42 s, 7 min, 3 h, 2 d."""
    for name, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"
