"""A tree's values: ``${NAME}`` from the environment, and the paths among them. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from clipcluster.errors import UserError
from clipcluster.recipe.sections.base import extra_of, walk
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tree import Entry, Loc, Variable, dotted, read_scalar

_REFERENCE = re.compile(r"\$?\$\{([^}]*)\}?")
_NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)


@cache
def _extras() -> dict[Loc, dict[str, Any]]:
    """What `key` recorded of every key and every entry of a list, by path (list positions as ``*``)."""
    extras: dict[Loc, dict[str, Any]] = {}
    for path, field in walk(Recipe):
        extras[path] = extras[(*path, "*")] = extra_of(field)
    return extras


def expand(text: str, environ: Mapping[str, str]) -> str:
    """Replace ``${NAME}`` and ``${NAME:-default}``; ``$${NAME}`` becomes ``${NAME}``; else ValueError."""

    def replace(match: re.Match[str]) -> str:
        if match[0].startswith("$$"):
            return match[0][1:]
        named = _NAMED.fullmatch(match[1]) if match[0].endswith("}") else None
        if named is None or "${" in match[1]:
            raise ValueError(f"{match[0]} is not valid; write ${{NAME}} or ${{NAME:-default}}")
        name, default = named[1], named[2]
        if default is not None:
            return environ.get(name) or default
        if name not in environ:
            raise ValueError(
                f"the environment variable {name} is not set; export {name}=… first, or write "
                f"${{{name}:-default}}"
            )
        return environ[name]

    return _REFERENCE.sub(replace, text)


def expanded(entry: Entry, environ: Mapping[str, str], key: str) -> Any:
    """A scalar's value; an unquoted one is parsed after its variables are replaced."""
    if not isinstance(entry.value, Variable):
        return entry.value
    try:
        text = expand(entry.value.text, environ)
    except ValueError as error:
        raise UserError(entry.origin.problem(key, str(error))) from None
    return read_scalar(text) if entry.value.bare else text


def values(
    tree: Entry,
    environ: Mapping[str, str],
    problems: dict[Loc, str],
    paths: dict[str, str] | None = None,
    loc: Loc = (),
) -> Any:
    """The tree as mappings, lists and values.

    Args:
        tree: the recipe, or what is below `loc` of it.
        environ: the environment.
        problems: collects messages about variables that are not set, by the key's location.
        paths: collects dotted path -> absolute path, or address, and the values become these; with None
            paths stay as they are written.
    """
    if isinstance(tree.value, dict):
        return {
            name: values(entry, environ, problems, paths, (*loc, name)) for name, entry in tree.value.items()
        }
    if isinstance(tree.value, list):
        return [
            values(entry, environ, problems, paths, (*loc, place)) for place, entry in enumerate(tree.value)
        ]
    key = dotted(loc)
    noted = _extras().get(tuple("*" if isinstance(part, int) else part for part in loc), {})
    kind = noted.get("path")
    if isinstance(tree.value, Variable) and ("shell" in noted or (kind and paths is None)):
        return tree.value.text
    try:
        value = expanded(tree, environ, key)
    except UserError as error:
        problems[loc] = str(error)
        return None
    location = _location(value, kind) if kind and isinstance(value, str) else None
    if location is None or paths is None:
        return value
    paths[key] = location
    return location


def _location(text: str, kind: str) -> str | None:
    """The absolute path, or the address, of a path as written; None where it is a name."""
    if "://" in text or text.startswith("pipe:"):
        return text if kind == "path" else None
    if kind == "path":
        is_path = text not in ("", "pretrained")
    else:
        is_path = text.startswith((".", "/", "~")) or os.path.exists(text)
    return os.path.abspath(os.path.expanduser(text)) if is_path else None
