"""What everything that resumes has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Stateful(Protocol):
    """A part whose state a checkpoint holds; a checkpoint is a `dict[str, Stateful]` and knows no names."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


Parts = Mapping[str, Stateful]
"""What a checkpoint holds, by name."""


def is_per_rank(part: Stateful) -> bool:
    """Whether the part says, by a true attribute `per_rank`, that its state differs from rank to rank.

    Every rank writes and reads a file of its own then; all other parts are the same on all ranks.
    """
    return bool(getattr(part, "per_rank", False))
