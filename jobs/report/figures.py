"""Which curves a page has, over one run or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jobs.report.curves import Curve, extremes, finite, means
from jobs.report.facts import Facts
from jobs.report.plots import Line, Mark, Plot, plot
from jobs.report.timeline import PREEMPTED, AttemptSummary

TITLES = {
    "loss": "loss",
    "lr": "learning rate",
    "logit_scale": "logit scale",
    "gradient_norm": "gradient norm",
    "samples_per_second": "throughput, samples/s",
    "data_wait_seconds": "wait for data, seconds a line",
}
"""The metrics that every page shows, in this order; a task's others follow."""
FROM_ZERO = ("lr", "samples_per_second", "data_wait_seconds")
NO_CURVES = ("step", "samples", "epoch", "time", "skipped_steps")
OTHERS = 6  # metrics of a task besides these that are shown
EVALUATED = 12  # evaluation figures that are shown as curves
POINTS, PAGE_POINTS = 1000, 40_000  # of one curve, and of all curves of a page
MARKS = 150  # where attempts resumed, in one drawing
MEANS = 200  # points of the line through a curve's middle


@dataclass(frozen=True)
class Figure:
    """A drawing and its title. `averaged`: its lines are means, with the extremes behind them."""

    title: str
    plot: Plot
    averaged: bool = False


@dataclass(frozen=True)
class Figures:
    """All curves of a page, over `x_axis` (step or samples)."""

    x_axis: str
    training: list[Figure]
    evaluations: list[Figure]


def figures_of(runs: Sequence[Facts]) -> Figures:
    """The curves of these runs, overlaid; over samples where their batches have different sizes."""
    x_axis = "samples" if len({size for facts in runs if (size := _batch_size(facts))}) > 1 else "step"
    logged = dict.fromkeys(name for facts in runs for name in facts.logged)
    others = sorted(name for name in logged if name not in (*TITLES, *NO_CURVES))
    shown = [*(name for name in TITLES if name in logged), *others[:OTHERS]]
    points = max(60, min(POINTS, PAGE_POINTS // max(1, len(shown) * len(runs))))
    end = max((_end(facts, x_axis) for facts in runs), default=1.0)
    marks = _marks(runs[0].attempts) if len(runs) == 1 else []
    training = []
    for number, name in enumerate(shown):
        lines = list(_training(runs, name, x_axis, points))
        if lines:
            title = TITLES.get(name, name.replace("_", " "))
            averaged = any(line.pale is not None for line in lines)
            drawn = plot(lines, end=end, from_zero=name in FROM_ZERO, marks=marks, number=number)
            training.append(Figure(title, drawn, averaged))
    evaluations = []
    for number, name in enumerate(_evaluated(runs)):
        lines = list(_measured(runs, name, x_axis, points))
        drawn = plot(lines, end=end, from_zero=False, marks=marks, number=len(shown) + number)
        evaluations.append(Figure(f"{name}, %", drawn))
    return Figures(x_axis, training, evaluations)


def _marks(attempts: Sequence[AttemptSummary]) -> list[Mark]:
    """Where the attempts after the first one resumed, of those at one place one, rather a preempted one's."""
    marks = [Mark(one.first_step, before.ending == PREEMPTED) for before, one in pairwise(attempts)]
    apart = max(1.0, max((mark.x for mark in marks), default=0.0) / MARKS)
    found: dict[int, Mark] = {}
    for mark in sorted(marks, key=lambda mark: mark.preempted):
        found[int(mark.x / apart)] = mark
    return list(found.values())


def _batch_size(facts: Facts) -> float:
    """Samples of a step; 0 where nothing says it."""
    samples, steps = facts.logged.get("samples"), facts.logged["step"]
    return float(samples[-1] / steps[-1]) if samples is not None and len(steps) and steps[-1] else 0.0


def _end(facts: Facts, x_axis: str) -> float:
    """The last step done or logged, or its samples."""
    last = max(1.0, facts.step, *map(float, facts.logged["step"][-1:]))
    return last * (_batch_size(facts) if x_axis == "samples" else 1.0)


def _training(runs: Sequence[Facts], name: str, x_axis: str, points: int) -> Iterator[Line]:
    for number, facts in enumerate(runs):
        if name not in facts.logged or x_axis not in facts.logged:
            continue
        curve = finite(facts.logged[x_axis], facts.logged[name])
        if not len(curve.x):
            continue
        middle = min(MEANS, points // 4)
        if len(curve.x) <= middle:
            yield Line(number, curve, dots=len(curve.x) == 1)
        else:
            yield Line(number, means(curve, middle), pale=extremes(curve, points - middle))


def _evaluated(runs: Sequence[Facts]) -> list[str]:
    """The headline figures of which some run has two or more."""
    names = dict.fromkeys(name for facts in runs for one in facts.evaluations for name in one.headline)
    several = [name for name in names if any(len(_values(facts, name)) > 1 for facts in runs)]
    return several[:EVALUATED]


def _values(facts: Facts, name: str) -> list[tuple[int, float]]:
    """(step, value) of the evaluations in which a figure was measured and finite."""
    values = [(one.step, one.results.get(name)) for one in facts.evaluations]
    return [(step, value) for step, value in values if value is not None and np.isfinite(value)]


def _measured(runs: Sequence[Facts], name: str, x_axis: str, points: int) -> Iterator[Line]:
    for number, facts in enumerate(runs):
        values = _values(facts, name)
        if values:
            scale = _batch_size(facts) if x_axis == "samples" else 1.0
            x, y = np.array(values, dtype=np.float64).T
            curve = extremes(Curve(x * scale, 100 * y), points)
            yield Line(number, curve, dots=len(curve.x) <= 100)
