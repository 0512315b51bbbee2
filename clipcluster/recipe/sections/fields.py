"""Walking over the sections and keys of a recipe, without one: for paths, reference and checks. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from clipcluster.recipe.sections.base import Section
from clipcluster.recipe.sections.recipe import Recipe


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section behind a field, also of an optional one and of a list of sections; None for a plain key."""
    candidates = [field.annotation]
    while candidates:
        annotation = candidates.pop()
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return annotation
        candidates.extend(getattr(annotation, "__args__", ()))
    return None


def is_list_of_sections(field: FieldInfo) -> bool:
    """Whether a field holds several sections (data.train)."""
    return section_of(field) is not None and getattr(field.annotation, "__origin__", None) is tuple


def extra_of(field: FieldInfo) -> dict[str, Any]:
    """What `key` noted beside a field: its mark, and whether it is a path or left to the shell."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def walk(
    model: type[Section] = Recipe, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every field of a section and of those below it, with its path; list positions are written ``*``."""
    for name, field in model.model_fields.items():
        path = (*prefix, name)
        yield path, field
        inner = section_of(field)
        if inner is not None:
            yield from walk(inner, (*path, "*") if is_list_of_sections(field) else path)
