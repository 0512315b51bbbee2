"""Numbers, spans and moments as the page shows them."""

from __future__ import annotations

import re
import time

from markupsafe import Markup

FAR = 1e6
"""No score of a model is so large."""
_UNITS = (("d", 86400), ("h", 3600), ("min", 60))


def count(value: float) -> str:
    """A whole number: 1,437."""
    return f"{value:,.0f}"


def figure(value: float | None) -> str:
    """A measured number in four digits; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def score(value: float | None) -> str:
    """A cosine or a probability; NaN stands in an evaluation as null, or as a number far below all."""
    return "not finite" if value is None or not abs(value) < FAR else f"{value:.3f}"


def duration(seconds: float | None) -> str:
    """A span in its two largest units: 2 d 3 h, 12 min 5 s, 4.2 s; empty for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole, parts = round(seconds), list[str]()
    for unit, size in (*_UNITS, ("s", 1)):
        if whole >= size or parts:
            parts.append(f"{whole // size} {unit}")
            whole %= size
        if len(parts) == 2:
            break
    return " ".join(part for part in parts if not part.startswith("0 "))


def moment(seconds: float | None) -> str:
    """A time (seconds since 1970) in UTC, to the minute; empty for None."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def breakable(name: str) -> Markup:
    """SET/METRIC, escaped, that may be broken behind its slashes."""
    return Markup("<wbr>").join(re.split(r"(?<=/)", name))
