"""A run's name, which its result keys decide, and the runs that differ from it in a few of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.runs.find import all_runs
from clipcluster.runs.folder import Run

FORMAT = 1  # of the run folder; part of every run's name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_RUN_NAME = re.compile(r"(?P<name>.+)-[0-9a-f]{8}")


def run_name(name: str, result: Mapping[str, Any]) -> str:
    """NAME-8hex: the start of the SHA-256 over the canonical JSON of `result` and the folder's format number.

    `result` holds the result keys that differ from their defaults, nested or dotted: a new key with a default
    changes no old run's name. Raises UserError for a NAME that cannot name a folder.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"name: {name!r} cannot name a folder. Allowed are letters, digits and . _ + = -, "
            "beginning with a letter or digit."
        )
    content = {"format": FORMAT, "result": _nested(result)}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return f"{name}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested value by dotted path, numbers stepping into lists."""
    if isinstance(value, Mapping) and (value or not prefix):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, (list, tuple)) and value:
        items = [(str(number), inner) for number, inner in enumerate(value)]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat.update(_flat(inner, f"{prefix}.{key}" if prefix else key))
    return flat


def _nested(value: Any) -> Any:
    """The value with string keys and plain containers, so that JSON sorts it in one way alone."""
    if isinstance(value, Mapping):
        return {str(key): _nested(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nested(inner) for inner in value]
    return value


@dataclass(frozen=True)
class Difference:
    """A result key whose value differs; None stands for a key that is not given."""

    key: str
    here: Any
    there: Any


@dataclass(frozen=True)
class SimilarRun:
    """A run of the same NAME that differs in a few result keys."""

    run: Run
    differences: list[Difference]


def similar_runs(name: str, recipe: Mapping[str, Any], folder: Path, *, at_most: int = 3) -> list[SimilarRun]:
    """Runs named NAME-8hex in `folder` whose result keys differ from `recipe` in 1 to `at_most` of them.

    `recipe` is the mapping that `recipe.yaml` would hold; the key `name` is not compared. The nearest first.
    """
    here = _flat({key: value for key, value in recipe.items() if key != "name"})
    found = []
    for run in all_runs(folder):
        match = _RUN_NAME.fullmatch(run.name)
        if match is None or match["name"] != name:
            continue
        there = _flat({key: value for key, value in run.recipe().items() if key != "name"})
        differences = [
            Difference(key, here.get(key), there.get(key))
            for key in sorted({*here, *there})
            if here.get(key) != there.get(key)
        ]
        if 1 <= len(differences) <= at_most:
            found.append(SimilarRun(run, differences))
    return sorted(found, key=lambda similar: (len(similar.differences), similar.run.name))
