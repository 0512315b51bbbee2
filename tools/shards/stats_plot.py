"""The figures of `shards stats` as a picture: one row of histograms a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.runs.files import require_writable
from tools.shards.stats import Stats

_COLOUR, _SECOND = "#33658a", "#f26419"
_MOST_KINDS = 8
_KINDS = (".png", ".pdf", ".svg", ".jpg")


def require_drawable(path: Path) -> None:
    """UserError for a name that cannot be drawn to, before hours of reading."""
    require_writable("--picture", path, _KINDS)


def draw(figures: Sequence[Stats], path: Path) -> None:
    """Writes the picture; its kind is the file's extension."""
    from matplotlib.figure import Figure  # half a second, for those who ask for a picture

    page = Figure(figsize=(17, 3.8 * len(figures)), layout="constrained")
    rows = page.subplots(len(figures), 4, squeeze=False)
    for stats, row in zip(figures, rows, strict=True):
        _kinds_of_images(row[0], stats)
        sides = {side: stats.images[side] for side in ("width", "height")}
        _histograms(row[1], sides, "pixels", "images")
        _histograms(row[2], {"bytes": stats.images["bytes"]}, "bytes of an image", "images")
        if stats.captions:
            _histograms(row[3], {"": stats.caption_characters}, "characters of a caption", "captions")
        else:
            _classes(row[3], stats.classes)
    page.savefig(path, dpi=110)


def _kinds_of_images(axes: Any, stats: Stats) -> None:
    names = list(stats.kinds)[:_MOST_KINDS]
    values = [stats.kinds[name] for name in names]
    if stats.bad:
        names, values = [*names, "bad"], [*values, len(stats.bad)]
    colours = [_SECOND if name == "bad" else _COLOUR for name in names]
    bars = axes.barh(names[::-1], values[::-1], height=0.6, color=colours[::-1])
    axes.set_ylim(-1, max(len(names), 3))
    axes.bar_label(bars, labels=[f"{value:,}" for value in values[::-1]], padding=3)
    axes.margins(x=0.25)
    axes.set(title=f"{stats.folder}\n{stats.samples:,} samples, {stats.captions:,} captions")


def _histograms(axes: Any, figures: Mapping[str, Mapping[str, Any]], unit: str, counted: str) -> None:
    """One or two histograms over each other, by what they are of."""
    for (name, one), colour in zip(figures.items(), (_COLOUR, _SECOND), strict=False):
        if one["count"]:
            edges, counts = one["histogram"]["edges"], one["histogram"]["counts"]
            axes.stairs(counts, edges, fill=True, color=colour, alpha=0.6, label=name)
    axes.set(xlabel=unit, ylabel=counted)
    if len(axes.patches) > 1:
        axes.legend(frameon=False)


def _classes(axes: Any, classes: Mapping[str, int]) -> None:
    axes.plot(np.sort(np.array(list(classes.values()), np.int64))[::-1], color=_COLOUR)
    axes.set(xlabel=f"{len(classes):,} classes, the largest first", ylabel="samples")
    axes.set_ylim(bottom=0)
