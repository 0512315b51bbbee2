"""What everything that resumes has in common."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Stateful(Protocol):
    """A part whose state a checkpoint holds; a checkpoint is a `dict[str, Stateful]` and knows no names."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...
