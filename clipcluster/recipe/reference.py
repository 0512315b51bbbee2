"""The reference page and the JSON Schema of recipes: ``python -m clipcluster.recipe.reference`` makes both.

Editors that know JSON Schema complete and check recipes with docs/recipe.schema.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from clipcluster.recipe.sections.base import (
    Section,
    extra_of,
    is_list_of_sections,
    kinds_of,
    sections_of,
)
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.sections.values import DEVIATIONS, MEANS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = "recipe.md"
SCHEMA = "recipe.schema.json"
_KEYS = "## Keys\n"  # from here on the page is made
_VARIABLE = {"type": "string", "pattern": r"\$\{"}  # any value may come from the environment
_WORDS = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}
# What a pattern is called, by a part of it.
_PATTERNS = {"steps": "duration", "minutes": "time", "MGT": "memory", r"\d": "range"}


def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, for editors: values may be variables, `extends` may come first."""
    made = _made()
    sections = [made, *made["$defs"].values()]
    for entry in sections:
        entry["properties"] = {name: _for_editors(value) for name, value in entry["properties"].items()}
    made["properties"] = {
        "extends": {"type": "string", "description": "Another recipe that this one starts from."},
        "sweep": {
            "type": ["object", "null"],
            "description": "Keys with several values each: every combination is a run of its own.",
        },
        "first": {"type": "array", "description": "What must be finished before the run starts."},
        "then": {"type": "array", "description": "What follows once the run has finished."},
        **made["properties"],
    }
    # A recipe that extends another need not say everything itself.
    for entry in sections:
        entry.pop("required", None)
        entry.pop("title", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "clipcluster recipe", **made}


def _made() -> dict[str, Any]:
    """Pydantic's JSON Schema, with the bounds of optional numbers by JSON Schema's names."""
    made = Recipe.model_json_schema()
    bounds = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    for entry in (made, *made["$defs"].values()):
        for value in entry["properties"].values():
            for choice in value.get("anyOf", ()):
                choice.update({bounds[name]: choice[name] for name in bounds if name in choice})
    return made


def _for_editors(value: dict[str, Any]) -> dict[str, Any]:
    """A key's schema with ``${NAME}`` allowed, and with what it decides in its description."""
    value = {name: entry for name, entry in value.items() if name not in ("title", "path", "shell")}
    mark = value.pop("mark", None)
    if mark is None:
        return value
    about = {"description": f"{value.pop('description')} (decides: {mark})"}
    if "default" in value:
        about["default"] = value.pop("default")
    choices = value.pop("anyOf", None) or [value]
    if not any(choice == {"type": "string"} for choice in choices):
        choices = [*choices, _VARIABLE]
    return {**about, "anyOf": choices} if len(choices) > 1 else {**about, **choices[0]}


def page() -> str:
    """The reference page in Markdown: the introduction that docs has already, then every key."""
    made = _made()
    introduction = (DOCS / PAGE).read_text(encoding="utf-8").partition(_KEYS)[0]
    parts = [introduction, _KEYS, "\n", _table(Recipe, made["properties"])]
    parts += _sections(Recipe, made["$defs"], "", {})
    return "".join(parts).rstrip() + "\n"


def _sections(
    model: type[Section], definitions: dict[str, Any], prefix: str, shown: dict[type[Section], str]
) -> list[str]:
    """The parts of the page for the sections below one; shown: sections described before -> their titles."""
    parts = []
    for name, field in model.model_fields.items():
        if not sections_of(field):
            continue
        title = f"{prefix}{name}"
        kind = "A list; each entry has:" if is_list_of_sections(field) else ""
        if not field.is_required() and field.default is None:
            kind = "Absent unless written."
        parts.append(f"\n### {title}\n\n{(field.description or '').rstrip('.')}. {kind}".rstrip() + "\n\n")
        kinds = kinds_of(field)
        same = next((shown[inner] for inner in sections_of(field) if inner in shown), None)
        if same:
            parts.append(f"The keys are those of [`{same}`](#{same}).\n")
            continue
        if kinds:
            parts.append(f"One of {len(kinds)} kinds, each recognised by a key that only it has.\n")
        for inner in sections_of(field):
            about = next((f"\nWith `{name}`:\n\n" for name, kind in kinds.items() if kind is inner), "")
            parts += [about, _table(inner, definitions[inner.__name__]["properties"])]
            below = _sections(
                inner, definitions, f"{title}.N." if is_list_of_sections(field) else f"{title}.", shown
            )
            if below:
                shown[inner] = title
            parts += below
    return parts


def _table(model: type[Section], properties: dict[str, Any]) -> str:
    """One section's keys as a table; "" if it has only sections."""
    rows = []
    for name, field in model.model_fields.items():
        if sections_of(field):
            continue
        cells = (
            f"`{name}`",
            _type(properties[name]),
            "*required*" if field.is_required() else _default(field),
            extra_of(field)["mark"],
            field.description or "",
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    head = "| key | value | default | decides | meaning |\n|---|---|---|---|---|\n"
    return head + "".join(rows) if rows else ""


def _type(value: dict[str, Any]) -> str:
    """A key's type in words."""
    if "enum" in value or "const" in value:
        return ", ".join(f"`{choice}`" for choice in value.get("enum", [value.get("const")]))
    if "anyOf" in value:
        words = dict.fromkeys(_type(choice) for choice in value["anyOf"] if choice.get("type") != "null")
        return " or ".join(words)
    kind = value.get("type")
    for part, word in _PATTERNS.items():
        if kind == "string" and part in value.get("pattern", ""):
            return word
    if kind == "array":
        if value.get("minItems") and value.get("minItems") == value.get("maxItems"):
            return f"{value['minItems']} numbers"
        return f"list of {_type(value['items'])}"
    if kind == "object":
        return "mapping"
    return _WORDS[str(kind)] + _bounds(value)


def _bounds(value: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [
        f"{sign} {value[name]}" for name, sign in signs.items() if name in value and value[name] < 2**62
    ]
    return f" ({', '.join(bounds)})" if bounds else ""


def _default(field: FieldInfo) -> str:
    """A default as a recipe writes it."""
    default = field.get_default(call_default_factory=True)
    named = {numbers: word for table in (MEANS, DEVIATIONS) for word, numbers in table.items()}
    if isinstance(default, tuple):
        default = named.get(default, f"[{', '.join(map(_shown, default))}]")
    return "" if default is None else f"`{_shown(default)}`"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    (DOCS / PAGE).write_text(page(), encoding="utf-8")
    (DOCS / SCHEMA).write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")
