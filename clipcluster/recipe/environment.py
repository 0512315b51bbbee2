"""``${NAME}`` from the environment, and the paths among a recipe's values. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from clipcluster.errors import UserError
from clipcluster.recipe.sections.fields import extra_of, walk
from clipcluster.recipe.tree import Branch, Leaf, Loc, Row, Tree, Value, dotted, read_scalar

_REFERENCE = re.compile(r"\$?\$\{([^}]*)\}?")
_NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)


@cache
def _special(kind: str) -> dict[Loc, str]:
    """Dotted paths (list positions as ``*``) of the keys whose `kind` (path, shell) is set."""
    return {path: extra_of(field)[kind] for path, field in walk() if kind in extra_of(field)}


def _kind(loc: Loc, kind: str) -> str | None:
    """What `key` noted of the key at `loc`, or of the list that contains it: its `path` or `shell`."""
    pattern = tuple("*" if isinstance(part, int) else part for part in loc)
    special = _special(kind)
    return special.get(pattern) or (special.get(pattern[:-1]) if pattern and pattern[-1] == "*" else None)


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


def expanded(leaf: Leaf, environ: Mapping[str, str], dotted: str) -> Any:
    """A leaf's value; an unquoted one is parsed after the expansion."""
    try:
        text = expand(leaf.text, environ)
    except ValueError as error:
        raise UserError(leaf.origin.problem(dotted, str(error))) from None
    return read_scalar(text) if leaf.bare else text


def plain(tree: Tree, environ: Mapping[str, str], problems: dict[Loc, str], *, keep_paths: bool) -> Any:
    """The tree as dictionaries, lists and values; `problems` collects what cannot be expanded."""

    def value_of(entry: Tree, loc: Loc) -> Any:
        if isinstance(entry, Branch):
            return {name: value_of(inner, (*loc, name)) for name, inner in entry.entries.items()}
        if isinstance(entry, Row):
            return [value_of(inner, (*loc, place)) for place, inner in enumerate(entry.entries)]
        if isinstance(entry, Value):
            return entry.value
        if _kind(loc, "shell") or (keep_paths and _kind(loc, "path")):
            return read_scalar(entry.text) if entry.bare else entry.text
        try:
            return expanded(entry, environ, dotted(loc))
        except UserError as error:
            problems[loc] = str(error)
            return None

    return value_of(tree, ())


def resolve_paths(value: Any, loc: Loc, paths: dict[str, str]) -> None:
    """Make the paths in `value` absolute, in place, and note them in `paths`."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for name, entry in list(entries):
        here = (*loc, name)
        if isinstance(entry, (dict, list)):
            resolve_paths(entry, here, paths)
            continue
        kind = _kind(here, "path")
        if not kind or not isinstance(entry, str):
            continue
        if kind == "path" and _is_address(entry):
            paths[dotted(here)] = entry  # with its variables expanded
        elif _is_path(entry, kind):
            value[name] = paths[dotted(here)] = os.path.abspath(os.path.expanduser(entry))


def _is_address(text: str) -> bool:
    return "://" in text or text.startswith("pipe:")


def _is_path(text: str, kind: str) -> bool:
    if not text or _is_address(text):
        return False
    if kind == "path":
        return text != "pretrained"
    return text.startswith((".", "/", "~")) or os.path.isdir(text)
