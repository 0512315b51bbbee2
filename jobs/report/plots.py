"""Curves as SVG inside the page.

Drawn by matplotlib, with placeholders for colours that the page's style sheet fills in: so a plot follows the
reader's dark or light mode, scales to a phone, prints, and needs no program in the page. A few lines of
script add the values under the pointer, which they read from the paths. Only numbers are written into it, no
text of a user's.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from jobs.report.curves import Curve

COLOURS = 8
"""Of the style sheet, `--c0` and following; further runs have them again, dashed."""
WIDTH, HEIGHT = 360, 180  # of the drawing, in its own units, which are pixels on a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 350, 8, 154  # of the axes in it, y downwards
_INK, _RULE, _MARK, _PREEMPTED = "#010203", "#040506", "#070809", "#0a0b0c"  # the placeholders
_STEPS = (1, 2, 2.5, 5, 10)  # between ticks, and these times powers of ten
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "path.simplify": False,
    "axes.edgecolor": _RULE,
    "axes.linewidth": 0.8,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": _RULE,
    "grid.linewidth": 0.5,
}
_INHERITED = re.compile(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL)
_SERIES = re.compile(r'id="series-(\d+)"')
_GROUP = re.compile(r' id="[a-zA-Z.0-9]+_\d+"')
_PATH = re.compile(r' d="[^"]*"')
_DECIMALS = re.compile(r"(\.\d{3})\d+")


@dataclass(frozen=True)
class Line:
    """One run's curve: `pale` is drawn behind it; with `dots` its points are marked."""

    run: int
    curve: Curve
    pale: Curve | None = None
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """Where an attempt began, after a preemption or for another reason."""

    x: float
    preempted: bool


@dataclass(frozen=True)
class Plot:
    """A drawing, and what the script needs to read values from it: the axes' box and limits."""

    svg: Markup
    box: str
    x_limits: str
    y_limits: str
    log: bool


def short(value: float, _: object = None) -> str:
    """A number in few characters: 12.5k, 0.00025."""
    for size, unit in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def plot(
    lines: Sequence[Line], *, end: float, from_zero: bool, marks: Sequence[Mark] = (), number: int = 0
) -> Plot:
    """The curves in one drawing, from 0 to `end`. `number`: of the drawing, for its ids.

    The scale begins at zero if `from_zero`, else with the least value; it is logarithmic where the greatest
    is over 100 times the least and that is positive.
    """
    low = min(float(line.curve.y.min()) for line in lines)
    high = max(float(line.curve.y.max()) for line in lines)
    log = not from_zero and high > 100 * low > 0
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"plot-{number}"}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes(
            (_LEFT / WIDTH, 1 - _BOTTOM / HEIGHT, (_RIGHT - _LEFT) / WIDTH, (_BOTTOM - _TOP) / HEIGHT)
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y")
        for line in lines:
            _draw(axes, line, alpha=0.35 if len(lines) == 1 else 0.15)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=5))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS, integer=True))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(short))
        bottom, top = axes.get_ylim()
        limits = (-0.02 * end, 1.02 * end), (min(0.0, bottom) if from_zero else bottom, top)
        for mark in marks:
            colour, dashes = (_PREEMPTED, (4, 2)) if mark.preempted else (_MARK, (1.5, 2.5))
            axes.axvline(mark.x, color=colour, linewidth=0.9, linestyle=(0, dashes), zorder=1, clip_on=False)
        axes.set(xlim=limits[0], ylim=limits[1])
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True)
    left, right, bottom, top = (float(limit) for pair in limits for limit in pair)
    return Plot(
        _for_the_page(text.getvalue()),
        f"{_LEFT} {_TOP} {_RIGHT} {_BOTTOM}",
        f"{left!r} {right!r}",
        f"{bottom!r} {top!r}",
        log,
    )


def _draw(axes: matplotlib.axes.Axes, line: Line, *, alpha: float) -> None:
    # Not clipped: a clip is found by its id, which must not be in a part of the page that is folded.
    style: Any = {
        "color": _colour(line.run),
        "linestyle": "-" if line.run < COLOURS else "--",
        "clip_on": False,
    }
    if line.pale is not None:
        axes.plot(*line.pale, linewidth=0.7, alpha=alpha, **style)
    dots: Any = {"marker": "o", "markersize": 3} if line.dots else {}
    (drawn,) = axes.plot(*line.curve, linewidth=1.5, **dots, **style)
    drawn.set_gid(f"series-{line.run}")


def _colour(run: int) -> str:
    return f"#fe{run % COLOURS:02x}fe"


def _for_the_page(svg: str) -> Markup:
    """matplotlib's file as an element of the page, coloured by its style sheet."""
    svg = _INHERITED.sub("", svg[svg.index("<svg") :])
    svg = _GROUP.sub("", _SERIES.sub(r'data-run="\1"', svg))
    svg = re.sub(r"<svg [^>]*?viewBox", '<svg aria-hidden="true" viewBox', svg, count=1)
    svg = _PATH.sub(lambda path: _DECIMALS.sub(r"\1", path[0]), svg)
    for colour, name in ((_INK, "muted"), (_RULE, "rule"), (_MARK, "mark"), (_PREEMPTED, "bad")):
        svg = svg.replace(colour, f"var(--{name})")
    for run in range(COLOURS):
        svg = svg.replace(_colour(run), f"var(--c{run})")
    return Markup(svg)
