"""A stop at a known place of a run."""

from __future__ import annotations

from typing import Any

from clipcluster.runtime.stop import Stop


class StopAfter(Stop):
    """Asks to stop at the n-th question."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self.questions = questions

    def wishes(self) -> Any:
        self.questions -= 1
        if self.questions == 0:
            self.request("the test's wish")
        return super().wishes()
