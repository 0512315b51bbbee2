"""The metrics of a long run as arrays: a million lines in seconds, never all in memory. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from clipcluster.runs import files
from clipcluster.runs.attempts import Attempt

Columns = dict[str, np.ndarray]
"""Name -> values of every line, (n,): `step` int64, the others float64, NaN where a line has no number."""

_LAST_BYTES = 65536
_NO_CURVES = frozenset({"step", "attempt"})


def columns_of(attempt: Attempt) -> Columns:
    """The numbers that an attempt logged, line by line: the keys of its first and its last line.

    The results of evaluations (SET/METRIC) are left out; an attempt that logged nothing has `step` alone.
    """
    path = attempt.path / "metrics.jsonl"
    names: list[str] = []
    steps: list[np.ndarray] = []
    values: dict[str, list[np.ndarray]] = {}
    for lines in files.line_chunks(path):
        lines = [line for line in lines if type(line.get("step")) is int]
        if lines and not names:
            last = files.read_lines(path, last_bytes=_LAST_BYTES)[-1:]
            names = _numbers_of([lines[0], *last])
            values = {name: [] for name in names}
        steps.append(np.fromiter(map(itemgetter("step"), lines), np.int64, len(lines)))
        for name in names:
            values[name].append(_column(lines, name))
    found = {name: np.concatenate(chunks) for name, chunks in values.items()}
    return {"step": np.concatenate([np.zeros(0, np.int64), *steps]), **found}


def _numbers_of(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that are plotted: numbers, or null where one was not finite."""
    return list(
        dict.fromkeys(
            name
            for line in lines
            for name, value in line.items()
            if name not in _NO_CURVES and "/" not in name and (value is None or type(value) in (int, float))
        )
    )


def _column(lines: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    try:
        return np.fromiter(map(itemgetter(name), lines), np.float64, len(lines))
    except (KeyError, TypeError, ValueError):  # absent from a line, null, or no number
        values = (line.get(name) for line in lines)
        return np.array([v if isinstance(v, (int, float)) else np.nan for v in values], np.float64)


def merged(parts: Sequence[Columns]) -> Columns:
    """The attempts' columns as one run's, by step: the highest attempt wins, within one the later line."""
    lengths = [len(part["step"]) for part in parts]
    steps = np.concatenate([np.zeros(0, np.int64), *(part["step"] for part in parts)])
    unique, from_the_end = np.unique(steps[::-1], return_index=True)
    chosen = len(steps) - 1 - from_the_end
    names = dict.fromkeys(name for part in parts for name in part if name != "step")
    table: Columns = {"step": unique}
    for name in names:
        pieces = [
            part.get(name, np.full(length, np.nan)) for part, length in zip(parts, lengths, strict=True)
        ]
        table[name] = np.concatenate(pieces)[chosen]
    return table
