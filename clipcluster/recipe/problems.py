"""What is wrong with a recipe, as messages: the place, the key, what was given, what is allowed.

Messages are built from the type and context of pydantic's errors, not from its English.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from clipcluster.errors import UserError
from clipcluster.recipe.sections.base import Section
from clipcluster.recipe.sections.fields import is_list_of_sections, section_of, walk
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tree import Branch, Leaf, Loc, Origin, dotted, find, nearest, origin_of, read_scalar

S = TypeVar("S", bound=Section)
# What should be there, by the type of pydantic's error; `{…}` is filled from its context.
EXPECTED = {
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "dict_type": "should be a mapping",
    "finite_number": "should be a finite number",
    "float_parsing": "should be a number",
    "float_type": "should be a number",
    "greater_than": "should be greater than {gt:g}",
    "greater_than_equal": "should be at least {ge:g}",
    "int_from_float": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_parsing_size": "should be a smaller number",
    "int_type": "should be a whole number",
    "less_than": "should be less than {lt:g}",
    "less_than_equal": "should be at most {le:g}",
    "string_pattern_mismatch": "should be letters, digits, '.', '_' and '-', a letter or digit first",
    "string_too_long": "should have at most {max_length} characters",
    "string_too_short": "should not be empty",
    "string_type": "should be text; write it in quotes",
    "tuple_type": "should be a list",
    "value_error": "{error}",
}


def validated(value: Any, tree: Branch, problems: dict[Loc, str], file: str, model: type[S]) -> S:
    """The recipe, or one UserError with everything that is wrong, in the order of the lines.

    Args:
        value: the recipe as mappings, lists and values.
        tree: the same with the place that wrote each entry.
        problems: what was found wrong before, by the key's location.
        file: the name of the recipe in the message.
        model: the section class of the whole.
    """
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
    raise UserError(f"{file}: {len(lines)} errors\n" + "\n".join(f"  {line}" for line in lines))


def _line_order(origin: Origin) -> tuple[str, int]:
    file, _, line = origin.place.rpartition(":")
    return (file, int(line)) if line.isdigit() else ("~", 0)


def _message(loc: Loc, entry: Mapping[str, Any], tree: Branch) -> str:
    """One line for one of pydantic's errors."""
    origin = origin_of(tree, loc)
    kind, value, field = entry["type"], entry["input"], _field_at(loc)
    if kind == "extra_forbidden":
        return origin.problem(dotted(loc), _unknown(loc))
    if kind == "missing":
        about = f" ({field.description.rstrip('.')})" if field and field.description else ""
        return origin.problem(dotted(loc[:-1]), f"the key {dotted(loc)} is missing{about}")
    if kind == "model_type":
        expected = f"should be a section with the keys {', '.join(_known_keys(loc))}"
    elif kind == "literal_error":
        expected = _one_of(value, _choices(field))
    elif kind in EXPECTED:
        expected = EXPECTED[kind].format(**entry.get("ctx", {}))
    else:  # a type that no key had when this was written: pydantic's own words
        expected = entry["msg"]
    example = (
        _example(loc, field, _written(loc, value, tree)) if kind in ("model_type", "tuple_type") else None
    )
    if example is not None:
        expected += f"; write {example}"
    if isinstance(value, dict) and example is None:
        return origin.problem(dotted(loc), expected)
    return origin.problem(dotted(loc), f"got {_given(loc, value, tree)}; {expected}")


def _choices(field: FieldInfo | None) -> list[str]:
    """The words of a key that takes one of several."""
    kinds = [field.annotation] if field else []
    while kinds:
        kind = kinds.pop()
        if get_origin(kind) is Literal:
            return [str(choice) for choice in get_args(kind)]
        kinds.extend(get_args(kind))
    return []


def _one_of(value: Any, choices: list[str]) -> str:
    near = nearest(str(value), choices)
    return f"should be {' or '.join(choices)}" + (f"; did you mean {near}?" if near else "")


def _example(loc: Loc, field: FieldInfo | None, value: Any) -> str | None:
    """How a value of the wrong shape would be written; None where that cannot be guessed."""
    if field is None:
        return None
    shown = _in_yaml(value)
    inner = section_of(field)
    if inner is not None and not isinstance(value, dict):
        keys = [name for name, entry in inner.model_fields.items() if entry.is_required()]
        keys = keys or list(inner.model_fields)
        if isinstance(value, (list, tuple)) or value is None or len(keys) != 1:
            return None
        shown = f"{{{keys[0]}: {shown}}}"
    if isinstance(loc[-1], int):
        return shown
    if inner is None or is_list_of_sections(field):
        shown = f"[{shown}]"
    return f"{dotted(loc)}: {shown}"


def _in_yaml(value: Any) -> str:
    """A value on one line, as a recipe would have it."""
    text: str = yaml.safe_dump([value], default_flow_style=True, width=1 << 30, sort_keys=False)
    return text.strip()[1:-1]


def _given(loc: Loc, value: Any, tree: Branch) -> str:
    """The value as it was written, and what it came to if it names a variable of the environment."""
    written = _written(loc, value, tree)
    return f"{_got(value)} (from {written})" if "${" in str(written) else _got(written)


def _written(loc: Loc, value: Any, tree: Branch) -> Any:
    """A scalar as it was written, before variables were read and paths made absolute; else `value`."""
    leaf = find(tree, loc)
    if not isinstance(leaf, Leaf):
        return value
    return read_scalar(leaf.text) if leaf.bare else leaf.text


def _got(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    text = {"None": "nothing", "True": "true", "False": "false"}.get(text, text)
    return text if len(text) <= 80 else text[:77] + "…"


def _field_at(loc: Loc) -> FieldInfo | None:
    """The key or section that `loc` names; for an entry of a list, the list's."""
    here: type[Section] | None = Recipe
    field = None
    for part in loc:
        if isinstance(part, int):
            continue
        field = here.model_fields.get(part) if here else None
        here = section_of(field) if field else None
    return field


def _known_keys(loc: Loc) -> list[str]:
    """The keys of the section that `loc` names."""
    around = Recipe if not loc else section_of(field) if (field := _field_at(loc)) else None
    return list(around.model_fields) if around else []


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
