"""Walking over the sections and keys of a recipe, without one: for paths, reference and checks. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from clipcluster.recipe.sections.base import Section
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.sections.union import Kinds


def parts_of(field: FieldInfo | None) -> list[Any]:
    """A field's annotation, then what it is made of, from the outside in; [] for an unknown key."""
    found: list[Any] = [field.annotation] if field else []
    for annotation in found:
        found.extend(getattr(annotation, "__args__", ()))
    return found


def sections_of(field: FieldInfo | None) -> tuple[type[Section], ...]:
    """The section behind a field (optional and listed ones too), every kind of a union, () for a key."""
    parts = parts_of(field)
    return tuple(
        dict.fromkeys(part for part in parts if isinstance(part, type) and issubclass(part, Section))
    )


def kinds_of(field: FieldInfo | None) -> dict[str, type[Section]]:
    """The kinds of a union of sections by the key that tells them; {} for any other field."""
    marks = list(field.metadata) if field else []
    for part in parts_of(field):
        marks.extend(getattr(part, "__metadata__", ()))
    return next((mark.sections for mark in marks if isinstance(mark, Kinds)), {})


def is_list_of_sections(field: FieldInfo) -> bool:
    """Whether a field holds several sections (data.train)."""
    return bool(sections_of(field)) and getattr(field.annotation, "__origin__", None) is tuple


def extra_of(field: FieldInfo) -> dict[str, Any]:
    """What `key` noted beside a field: its mark, and whether it is a path or left to the shell."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def walk(
    model: type[Section] = Recipe, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every field of a section and of those below it, with its path; list positions are written ``*``.

    A key that several kinds of a union have comes once for each.
    """
    for name, field in model.model_fields.items():
        path = (*prefix, name)
        yield path, field
        for inner in sections_of(field):
            yield from walk(inner, (*path, "*") if is_list_of_sections(field) else path)
