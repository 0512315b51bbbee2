"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("clipcluster")


class Display:
    """Shows log steps; on a terminal one line that moves, elsewhere one line each."""

    def __init__(self, total_steps: int, first_step: int = 0) -> None:
        self._total = total_steps
        self._bar: Any = None
        self._task: Any = None
        if sys.stderr.isatty():
            self._open_bar(first_step)

    def _open_bar(self, first_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("training", total=self._total, completed=first_step)
        self._bar.start()

    def show(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics."""
        text = summary(line)
        if self._bar:
            self._bar.update(self._task, completed=line["step"], description=text)
        else:
            logger.info("step %s/%s  %s", f"{line['step']:,}", f"{self._total:,}", text)

    def note(self, text: str) -> None:
        """Say something beside the metrics."""
        logger.info("%s", text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar:
            self._bar.stop()
            self._bar = None


def summary(line: Mapping[str, Any]) -> str:
    """The few numbers of a line of metrics that a person follows."""
    parts = [f"epoch {line['epoch']:.2f}", f"loss {line['loss']:.4f}", f"lr {line['lr']:.2e}"]
    parts.append(f"{line['samples_per_second']:,.0f} samples/s")
    parts.append(f"waited {line['data_wait_seconds']:.2f} s for data")
    if line.get("skipped_steps"):
        parts.append(f"{line['skipped_steps']} steps skipped")
    return "  ".join(parts)


def results_text(results: Mapping[str, float], count: int = 6) -> str:
    """The first results of an evaluation in one line, and how many there are."""
    shown = "  ".join(f"{name} {value:.4g}" for name, value in list(results.items())[:count])
    return shown + (f"  … {len(results)} in all" if len(results) > count else "")
