"""The batches that a run skips because it rolled back from steps that were not finite. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clipcluster.runs.files import BrokenFile, read_object

FILE = "roll_back.json"  # in the folder of the attempt that rolled back


def skipped_by(attempt: Path) -> list[tuple[int, int]]:
    """The ranges of batches, (first, past the last), that an attempt's roll-back skips; mostly none.

    Raises BrokenFile.
    """
    found = read_object(attempt / FILE, skipped=list) or {"skipped": []}
    try:
        return [(int(first), int(past)) for first, past in found["skipped"]]
    except (TypeError, ValueError) as error:
        raise BrokenFile(f"{attempt / FILE} is damaged: {error}") from error


def saved_within(skipped: Iterable[tuple[int, int]], state: Mapping[str, Any]) -> str:
    """Why a checkpoint that was saved within these ranges of batches is unusable; "" for any other.

    state: its state.json.
    """
    for first, past in skipped:
        if state["batches_drawn"] > first and [first, past] not in state["skipped"]:
            return (
                f"saved within batches {first} to {past - 1}, which the run skips: their loss or gradient "
                "was not finite"
            )
    return ""
