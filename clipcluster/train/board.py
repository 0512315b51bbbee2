"""TensorBoard's curves, beside metrics.jsonl: nothing else depends on them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger("clipcluster")


class Board:
    """One file an attempt, written by rank 0; later points of an earlier attempt are hidden.

    Where it cannot be written (a full disk), one warning says so and the curves stop.
    """

    def __init__(self, folder: Path, *, attempt: int, step: int) -> None:
        """`attempt`: its number; `step`: where it begins."""
        self._writer: Any = None
        with self._giving_up():
            self._writer = _open(folder, attempt, step)

    def add(self, group: str, values: Mapping[str, Any], step: int) -> None:
        """Add points GROUP/NAME at a step; the caller has just asked whether the attempt owns the run."""
        if self._writer is None:
            return
        with self._giving_up():
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            with self._giving_up():
                self._writer.close()
        self._writer = None

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # errors of TensorBoard's thread are raised here
            self._writer = None
            logger.warning("TensorBoard curves stop for the rest of this attempt: %s", error)


def _open(folder: Path, attempt: int, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    purge = step + 1 if attempt > 1 else None
    return SummaryWriter(str(folder), filename_suffix=f".attempt-{attempt}", purge_step=purge)
