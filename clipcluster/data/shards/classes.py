"""The classes of a classifier's sources: how many there are, and that every sample has one. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipcluster.data.shards.captions import CLASS_NAMES
from clipcluster.data.shards.metadata import Metadata
from clipcluster.errors import UserError

_SCAN = 1 << 22  # classes looked at together


def class_count(given: int | None, sources: Sequence[Metadata]) -> int:
    """How many classes a classifier of these sources has: as `given`, else the lines of classnames.txt.

    UserError where neither tells, or where the sources' class names differ: a number would mean two classes.
    """
    named = [(number, names) for number, source in enumerate(sources) if (names := source.classnames)]
    for number, names in named[1:]:
        first, expected = named[0]
        if names != expected:
            raise UserError(
                f"data.train.{number}: its {CLASS_NAMES} differs from that of data.train.{first}, so that a "
                "class number means two classes; convert the sources with one list of classes"
            )
    if given is not None:
        return given
    if not named:
        raise UserError(
            f"model.classes: no {CLASS_NAMES} beside the shards of data.train tells the number of classes; "
            "set model.classes, or write the file (line N + 1 names class N)"
        )
    return len(named[0][1])


def classes_of(source: Metadata) -> tuple[int, int]:
    """The largest class of a source's samples (-1: none has one), and how many samples have none."""
    highest, without = -1, 0
    for low in range(0, source.n_samples, _SCAN):
        classes = np.asarray(source.classes[low : low + _SCAN])
        highest, without = max(highest, int(classes.max())), without + int((classes < 0).sum())
    return highest, without


def check_classes(count: int, sources: Sequence[Metadata]) -> None:
    """UserError unless every sample of the sources has a class from 0 to `count` - 1."""
    for number, source in enumerate(sources):
        highest, without = classes_of(source)
        if without:
            raise UserError(
                f"data.train.{number} ({source.name}): {without:,} of {source.n_samples:,} samples have no "
                "class (KEY.cls), and task classify needs one of each"
            )
        if highest >= count:
            raise UserError(
                f"data.train.{number} ({source.name}) has a sample of class {highest}, and the model "
                f"{count:,} classes (0 to {count - 1}); set model.classes to at least {highest + 1}, and "
                f"complete {CLASS_NAMES}"
            )


def check_measured(count: int | None, source: Metadata) -> None:
    """UserError unless an evaluation on `count` classes (None: any) can measure a source.

    Samples without a class are not measured; one at least has to have one.
    """
    highest, _ = classes_of(source)
    if highest < 0:
        raise UserError("no sample has a class (KEY.cls)")
    if count is not None and highest >= count:
        raise UserError(f"a sample has class {highest}, and the classes are 0 to {count - 1}")
