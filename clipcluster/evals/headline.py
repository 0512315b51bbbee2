"""What evaluations are called, and their results in the order in which people read them. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from clipcluster.data.storage.urls import redacted
from clipcluster.errors import UserError
from clipcluster.recipe.sections.evaluate import Entry, Evaluate, folders_of
from clipcluster.recipe.tasks import METRICS


@dataclass(frozen=True)
class Kind:
    """A group of metrics that belong together, and what they mean."""

    title: str
    explanation: str
    prefixes: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()

    def has(self, metric: str) -> bool:
        """Whether the metric (without its set) is of this kind."""
        return metric.startswith(self.prefixes) and (not self.suffixes or metric.endswith(self.suffixes))


COUNTS = Kind("counts", "what the fractions are taken of", ("",), ("images", "pairs", "captions", "classes"))
CLASSIFICATION = Kind(
    "classification",
    "fraction of the images whose class scores best, or among five; mean_per_class: the mean of its classes; "
    "raw: without the moving average of the weights",
    ("top1", "top5", "mean_per_class", "raw_top", "raw_mean"),
)
ZERO_SHOT = Kind(
    "zero-shot",
    "fraction of the images whose class is nearest, or among five; mean_per_class: the mean of its classes",
    ("zero_shot_",),
)
PROBE = Kind(
    "probe",
    "fraction of the images whose class nearest neighbours, or a linear classifier, give on frozen features",
    ("knn_", "linear_"),
)
GROUPED = Kind(
    "retrieval",
    "rK: fraction of the queries with a match among the first K; any caption of an image is a match; "
    "mean_recall: the mean of the six",
    ("i2t_", "t2i_", "mean_recall"),
)
PAIRED = Kind(
    "retrieval, paired",
    "row i must find row i, as OpenCLIP counts in training: an image's other captions are wrong, so that "
    "with five captions an image a perfect model has r1 0.2",
    ("paired_",),
)
LOSS = Kind(
    "loss",
    "of pairs, in fixed groups of at most 1,024; of a classifier the cross-entropy; without label smoothing",
    ("loss", "raw_loss"),
)
OTHER = Kind("other", "", ("",))
ORDER = (CLASSIFICATION, ZERO_SHOT, PROBE, GROUPED, LOSS, PAIRED, COUNTS, OTHER)
HEADLINE = (
    *("top1", "raw_top1", "zero_shot_top1", "linear_top1", "knn_top1"),
    *("i2t_r1", "t2i_r1", "mean_recall"),
)


@dataclass(frozen=True)
class Result:
    """One figure. `name` is SET/METRIC as in the files; `value` is None or NaN where it was not finite."""

    name: str
    value: float | None

    @property
    def set(self) -> str:
        return self.name.rpartition("/")[0]

    @property
    def metric(self) -> str:
        """The metric without its set and without what its kind says already."""
        metric = self.name.rpartition("/")[2]
        if self.kind is COUNTS:
            return metric
        return metric.removeprefix("zero_shot_").removeprefix("paired_")

    @property
    def kind(self) -> Kind:
        metric = self.name.rpartition("/")[2]
        return next(kind for kind in (COUNTS, *ORDER) if kind.has(metric))

    @property
    def text(self) -> str:
        """A fraction as a percentage, a count whole, a rank with one decimal, a loss with four."""
        if self.value is None or not math.isfinite(self.value):
            return "not finite"
        if "rank" in self.metric:
            return f"{self.value:.1f}"
        if self.kind is COUNTS:
            return f"{self.value:,.0f}"
        if self.metric.endswith("loss"):
            return f"{self.value:.4f}"
        return f"{100 * self.value:.2f} %" if 0 <= self.value <= 1 else f"{self.value:g}"


def ordered(results: Mapping[str, float | None]) -> dict[Kind, list[Result]]:
    """SET/METRIC -> value by kind, in `ORDER`: the headline first, counts and others last.

    Within a kind the sets and metrics keep their order; kinds without a result are absent.
    """
    found = [Result(name, value) for name, value in results.items()]
    by_kind = {kind: [result for result in found if result.kind is kind] for kind in ORDER}
    return {kind: own for kind, own in by_kind.items() if own}


def headline(results: Mapping[str, float | None]) -> list[Result]:
    """What a person reads first: top-1 of every kind, grouped R@1, mean recall; else the first three."""
    every = [result for own in ordered(results).values() for result in own]
    return [result for result in every if result.name.rpartition("/")[2] in HEADLINE] or every[:3]


def headline_text(results: Mapping[str, float | None]) -> str:
    """One line: the headline, and how many results there are."""
    chosen = headline(results)
    shown = ", ".join(f"{result.name} {result.text}" for result in chosen)
    return shown + (f" ({len(results)} results in all)" if len(results) > len(chosen) else "")


def named_sets(evaluate: Evaluate) -> list[tuple[str, Entry, str]]:
    """Every evaluation of a recipe's section: its kind, its entry, the name of its set (SET of its metrics).

    Raises UserError where two of one kind have one name.
    """
    chosen = [(kind, entry) for kind in METRICS for entry in evaluate.entries(kind)]
    names = set_names(folders_of(entry)[0] for _, entry in chosen)
    found = [
        (kind, entry, getattr(entry, "name", None) or names[folders_of(entry)[0]]) for kind, entry in chosen
    ]
    counts = Counter((kind, name) for kind, _, name in found)
    for kind, name in (own for own, count in counts.items() if count > 1):
        raise UserError(
            f"evaluate.{kind}: two sets are called {name}, and so are their metrics; "
            + ("give one a name of its own (name: …)" if kind == "zero_shot" else "remove one")
        )
    return found


def set_names(folders: Iterable[str]) -> dict[str, str]:
    """The name of each folder's set: its last component, after as many parents as tell it from the others.

    Addresses that differ in what is not shown (a key) are numbered.
    """
    parts = {f: [part for part in Path(redacted(f)).parts if part != "/"] or ["root"] for f in folders}
    lengths = dict.fromkeys(parts, 1)
    while True:
        names = {folder: "-".join(own[-lengths[folder] :]) for folder, own in parts.items()}
        counts = Counter(names.values())
        growing = [f for f, name in names.items() if counts[name] > 1 and lengths[f] < len(parts[f])]
        if not growing:
            numbered = enumerate(names.items(), start=1)
            return {f: f"{name}-{number}" if counts[name] > 1 else name for number, (f, name) in numbered}
        for folder in growing:
            lengths[folder] += 1
