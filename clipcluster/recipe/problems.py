"""What is wrong with a recipe, said so that it can be mended: place, key, what was given, what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from clipcluster.errors import UserError
from clipcluster.recipe.sections.base import Section
from clipcluster.recipe.sections.fields import section_of, walk
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tree import Branch, Leaf, Loc, Origin, dotted, find, nearest, origin_of, read_scalar

S = TypeVar("S", bound=Section)


def validated(value: Any, tree: Branch, problems: dict[Loc, str], file: str, model: type[S]) -> S:
    """The recipe, or one UserError with everything that is wrong, in the order of the lines."""
    recipe = None
    try:
        recipe = model.model_validate(value)
    except ValidationError as error:
        for entry in error.errors(include_url=False):
            loc = tuple(entry["loc"])
            if not any(loc[: len(failed)] == failed for failed in problems):
                problems[loc] = _message(loc, entry, tree)
    if recipe is not None and not problems:
        return recipe
    lines = [problems[loc] for loc in sorted(problems, key=lambda loc: _line_order(origin_of(tree, loc)))]
    if len(lines) == 1:
        raise UserError(lines[0])
    raise UserError(f"{file}: {len(lines)} mistakes\n" + "\n".join(f"  {line}" for line in lines))


def _line_order(origin: Origin) -> tuple[str, int]:
    file, _, line = origin.place.rpartition(":")
    return (file, int(line)) if line.isdigit() else ("~", 0)


def _message(loc: Loc, entry: Mapping[str, Any], tree: Branch) -> str:
    """One line for one of pydantic's errors."""
    origin = origin_of(tree, loc)
    kind = entry["type"]
    if kind == "extra_forbidden":
        return origin.problem(dotted(loc), _unknown(loc))
    if kind == "missing":
        around = dotted(loc[:-1])
        field = _field_help(loc)
        return origin.problem(
            around, f"the key {dotted(loc)} is missing ({field})" if field else "a key is missing"
        )
    if kind == "model_type":
        keys = ", ".join(_known_keys(loc))
        return origin.problem(
            dotted(loc), f"got {_got(entry['input'])}; should be a section with the keys {keys}"
        )
    text = (
        entry["msg"]
        .removeprefix("Value error, ")
        .replace("Input should", "should")
        .replace("String should", "should")
    )
    text = re.sub(r", (unable to parse|got a number with) .*", "", text)  # `got` says it already
    text = text.replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping")
    text = text.replace("a valid integer", "a whole number").replace("a valid", "a")
    if kind == "string_type":
        text = "should be text; write it in quotes"
    if kind == "string_pattern_mismatch":
        text = "should be letters, digits, '.', '_' and '-', a letter or digit first"
    if kind in ("bool_type", "bool_parsing"):
        text = "should be true or false"
    if isinstance(entry["input"], dict):
        return origin.problem(dotted(loc), text)
    return origin.problem(dotted(loc), f"got {_given(loc, entry['input'], tree)}; {text}")


def _given(loc: Loc, value: Any, tree: Branch) -> str:
    """The value as it was written, and what it came to if it names a variable of the environment."""
    leaf = find(tree, loc)
    if not isinstance(leaf, Leaf):
        return _got(value)
    if "${" in leaf.text:
        return f"{_got(value)} (from {leaf.text})"
    return _got(read_scalar(leaf.text) if leaf.bare else leaf.text)


def _got(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    text = {"None": "nothing", "True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= 80 else text[:77] + "…"


def _section_at(loc: Loc) -> type[Section] | None:
    """The section class that `loc` names, if it names one."""
    here: type[Section] | None = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        field = here.model_fields.get(part) if here else None
        here = section_of(field) if field else None
    return here


def _known_keys(loc: Loc) -> list[str]:
    around = _section_at(loc)
    return list(around.model_fields) if around else []


def _field_help(loc: Loc) -> str | None:
    around = _section_at(loc[:-1])
    field = around.model_fields.get(str(loc[-1])) if around else None
    return field.description.rstrip(".") if field and field.description else None


def _unknown(loc: Loc) -> str:
    """What to say of an unknown key: the nearest right one, here or elsewhere, else all known here."""
    word, around = str(loc[-1]), dotted(loc[:-1])
    known = _known_keys(loc[:-1])
    prefix = f"{around}." if around else ""
    near = nearest(word, known)
    if near:
        return f"unknown key; did you mean {prefix}{near}?"
    everywhere = {str(path[-1]): ".".join(path) for path, _ in reversed(list(walk()))}
    if word in everywhere:
        return f"unknown key; did you mean {everywhere[word].replace('*', '0')}?"
    return f"unknown key; {around or 'a recipe'} knows {', '.join(known)}"
