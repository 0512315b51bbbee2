"""The samples that a run consumed, by all its attempts together."""

from __future__ import annotations

from typing import Any

from clipcluster.runs.folder import Run
from clipcluster.runs.merge import lines


def merged_samples(run: Run) -> list[dict[str, Any]]:
    """The samples recorded (`train.record_samples`), one line a slot, by step and slot.

    A step belongs to the latest attempt that consumed it.
    """
    steps: dict[int, dict[int, dict[str, Any]]] = {}
    for line in lines(run, "samples-*.jsonl", step=int, slot=int):
        slots = steps.setdefault(line["step"], {})
        if any(known["attempt"] < line["attempt"] for known in slots.values()):
            slots.clear()
        slots[line["slot"]] = line
    return [slots[slot] for _, slots in sorted(steps.items()) for slot in sorted(slots)]
