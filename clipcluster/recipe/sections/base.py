"""What every section of a recipe is made of: its class, and `key`, which documents and marks a key.

Every key carries one of three marks:

- ``result``: decides the trained weights; part of the run's name;
- ``speed``: decides how fast the run is, never its weights;
- ``record``: decides what is kept, measured, or where the run takes place.

`key` also notes which strings are paths (they belong to the recipe as written, see `clipcluster.recipe.load`)
and which are left to the shell. Sections are frozen and refuse unknown keys. No torch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Mark = Literal["result", "speed", "record"]


def key(
    mark: Mark,
    description: str,
    default: Any = ...,
    *,
    path: str | None = None,
    shell: bool = False,
    **limits: Any,
) -> Any:
    """One key of a recipe.

    Args:
        mark: what the key decides.
        description: one sentence or two for the reference page.
        default: the value when the key is left out; none makes the key required.
        path: ``"path"`` when the string is always a path, ``"name"`` when it is a folder or else a name.
        shell: the text is left to the shell, ``${NAME}`` included.
        limits: pydantic's (``ge``, ``le``, ``min_length``, …).
    """
    extra: dict[str, Any] = {"mark": mark}
    if path:
        extra["path"] = path
    if shell:
        extra["shell"] = True
    if isinstance(default, (list, dict)):
        limits["default_factory"] = default.copy
    elif default is not ...:
        limits["default"] = default
    return Field(description=description, json_schema_extra=extra, **limits)


def section(description: str, default: Any = ...) -> Any:
    """A section of a recipe: a class gives its defaults, None leaves it out, nothing makes it required."""
    if isinstance(default, type):
        return Field(description=description, default_factory=default)
    return (
        Field(description=description) if default is ... else Field(default=default, description=description)
    )


class Section(BaseModel):
    """What all sections share: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())
