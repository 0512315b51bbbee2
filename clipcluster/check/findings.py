"""What a check found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from clipcluster.errors import UserError
from clipcluster.runtime.outcome import Failure

T = TypeVar("T")


@dataclass
class Findings:
    """What a check found: `errors` stop a submission, `warnings` do not, `summary` is what will happen."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)

    def attempt(self, key: str, action: Callable[..., T], *args: Any, foreign: bool = False) -> T | None:
        """The result of `action(*args)`, or None with the error's message among `errors`.

        foreign: the action ends in other people's code, and whatever it raises is an error of the recipe.
        """
        try:
            return action(*args)
        except (UserError, Failure) as error:
            text = "; ".join(filter(None, (str(error), getattr(error, "advice", ""))))
            self.errors.append(text if not key or text.startswith(key) else f"{key}: {text}")
        except Exception as error:
            if not foreign:
                raise
            self.errors.append(f"{key}: {type(error).__name__}: {error}")
        return None

    def raise_errors(self) -> None:
        """UserError with all the errors, if there is one."""
        if self.errors:
            head = "" if len(self.errors) == 1 else f"{len(self.errors)} errors\n  "
            raise UserError(head + "\n  ".join(self.errors))
