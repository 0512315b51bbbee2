"""Messages for the errors of a recipe: the place, the key, what was given, what is allowed.

They are built from the type and context of pydantic's errors, not from its English.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from clipcluster.errors import UserError
from clipcluster.recipe.environment import values
from clipcluster.recipe.sections.base import (
    KeyProblem,
    Section,
    is_list_of_sections,
    kinds_of,
    parts_of,
    sections_of,
    walk,
)
from clipcluster.recipe.tree import Entry, Loc, Origin, Variable, dotted, find, loc_of, origin_of
from clipcluster.text import did_you_mean, nearest

S = TypeVar("S", bound=Section)
# What is allowed, by the type of pydantic's error; `{…}` is filled from its context.
EXPECTED = {
    "bool_parsing": "should be true or false",
    "bool_type": "should be true or false",
    "dict_type": "should be a mapping, {{NAME: VALUE}}",
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
    "string_type": "should be text{quoted}",
    "too_short": "should not be empty",
    "tuple_type": "should be a list",
    "value_error": "{error}",
}


def validated(
    tree: Entry,
    environ: Mapping[str, str],
    file: str,
    model: type[S],
    paths: dict[str, str] | None = None,
) -> S:
    """The recipe of a tree, or one UserError with all errors, in the order of the lines.

    Args:
        tree, environ, paths: as in `values`.
        file: the name of the recipe in the message.
        model: the class of the whole recipe.
    """
    problems: dict[Loc, str] = {}
    value = values(tree, environ, problems, paths)
    try:
        recipe = model.model_validate(value)
        if not problems:
            return recipe
    except ValidationError as error:
        for entry in error.errors(include_url=False):
            problem = entry.get("ctx", {}).get("error")
            about = loc_of(problem.key) if isinstance(problem, KeyProblem) else ()
            key = Key.of((*entry["loc"], *about), model)
            # pydantic counts the entries of a list without those that are wrong
            inside = entry["type"] == "too_short" and any(at[: len(key.loc)] == key.loc for at in problems)
            if not inside and not any(key.loc[: len(failed)] == failed for failed in problems):
                problems[key.loc] = _message(key, entry, tree, model)
    lines = [problems[loc] for loc in sorted(problems, key=lambda loc: _line_order(origin_of(tree, loc)))]
    if len(lines) == 1:
        raise UserError(lines[0])
    raise UserError(f"{file}: {len(lines)} errors\n" + "\n".join(f"  {line}" for line in lines))


def _line_order(origin: Origin) -> tuple[str, int]:
    file, _, line = origin.place.rpartition(":")
    return (file, int(line)) if line.isdecimal() else ("~", 0)


@dataclass(frozen=True)
class Key:
    """A key or section of a recipe, known or not, at the location of an error.

    Attributes:
        loc: the path as a recipe writes it, without the kind that pydantic names after a union of sections.
        field: the field; for an entry of a list, the list's; None for an unknown key.
        around: the section that has the key.
        kinds: all kinds of `around`, by the key that recognises each; {} where it is not one of several.
    """

    loc: Loc
    field: FieldInfo | None
    around: type[Section]
    kinds: Mapping[str, type[Section]]

    @classmethod
    def of(cls, given: Loc, root: type[Section]) -> Key:
        """The key at pydantic's location `given` in a recipe of the class `root`."""
        key = cls((), None, root, {})
        inside: type[Section] | None = root
        kinds: Mapping[str, type[Section]] = {}
        around_kinds: Mapping[str, type[Section]] = {}
        for part in given:
            if part in kinds:  # pydantic's name of the kind
                inside, around_kinds, kinds = kinds[str(part)], kinds, {}
            elif isinstance(part, int) or inside is None:
                key = replace(key, loc=(*key.loc, part), field=key.field if isinstance(part, int) else None)
            else:
                field = inside.model_fields.get(part)
                key = cls((*key.loc, part), field, inside, around_kinds)
                inside, around_kinds, kinds = next(iter(sections_of(field)), None), {}, kinds_of(field)
        return key

    @property
    def path(self) -> str:
        return dotted(self.loc)


def _message(key: Key, entry: Mapping[str, Any], tree: Entry, root: type[Section]) -> str:
    """One line for one of pydantic's errors."""
    origin = origin_of(tree, key.loc)
    kind, value = entry["type"], entry["input"]
    if kind == "extra_forbidden":
        return origin.problem(key.path, _unknown(key, root))
    if kind == "missing":
        about = f" ({key.field.description.rstrip('.')})" if key.field and key.field.description else ""
        return origin.problem(dotted(key.loc[:-1]), f"the key {key.path} is missing{about}")
    if kind == "kind_ambiguous":
        return _two_kinds(key, value, tree)
    if kind == "kind_missing":
        return origin.problem(key.path, _no_kind(key, value))
    keys = ", or ".join(", ".join(section.model_fields) for section in sections_of(key.field))
    if kind in ("model_type", "kind_type"):
        expected = f"should be a section with the keys {keys}"
    elif kind == "literal_error":
        choices = _choices(key)
        word = str(value).lower().replace("bfloat", "bf").replace("float", "fp")  # FP16, float16
        expected = f"should be {' or '.join(choices)}{did_you_mean(word, choices)}"
    elif kind in EXPECTED:
        plain = isinstance(value, (bool, int, float))
        context = {"quoted": "; write it in quotes" if plain else "", **entry.get("ctx", {})}
        if isinstance(context.get("error"), KeyProblem):
            context["error"] = context["error"].problem
        expected = EXPECTED[kind].format(**context)
    else:  # a type that no key has today: pydantic's own message
        expected = entry["msg"]
    examples = []
    if kind in ("model_type", "kind_type", "tuple_type"):
        in_file = "{1}" if isinstance(key.loc[-1], int) else "{0}: {1}"
        form = in_file if origin.override is None else "'{0}={1}'"
        examples = [form.format(key.path, shape) for shape in _examples(key, _written(key.loc, value, tree))]
        if examples:
            expected += f"; write {' or '.join(examples)}"
        elif kind == "tuple_type" and keys:
            expected += f" of sections with the keys {keys}"
        elif kind == "tuple_type" and _choices(key):
            expected += f" of {', '.join(_choices(key))}"
    if isinstance(value, dict) and not examples:
        return origin.problem(key.path, expected)
    return origin.problem(key.path, f"got {_given(key.loc, value, tree)}; {expected}")


def _choices(key: Key) -> list[str]:
    """The literals that a key, or an entry of its list, may be; [] where it may be other values."""
    literals = [part for part in parts_of(key.field) if get_origin(part) is Literal]
    return [str(choice) for literal in literals for choice in get_args(literal)]


def _examples(key: Key, value: Any) -> list[str]:
    """How a value of the wrong shape would be written, one for each kind; [] where it cannot be guessed."""
    if key.field is None:
        return []
    shapes = [_in_yaml(value)]
    kinds = sections_of(key.field)
    if not kinds and _choices(key) and value not in _choices(key):
        return []
    if kinds and not isinstance(value, dict):
        if isinstance(value, (list, tuple)) or value is None:
            return []
        required = [[n for n, f in kind.model_fields.items() if f.is_required()] for kind in kinds]
        if isinstance(value, bool):  # whether to have the section at all
            if not value:
                return ["null"] if key.field.default is None else []
            return [] if any(required) else ["{}"]
        names = [keys or _fitting(kind, value) for keys, kind in zip(required, kinds, strict=True)]
        single = [(kind, keys[0]) for keys, kind in zip(names, kinds, strict=True) if len(keys) == 1]
        shapes = [f"{{{n}: {shapes[0]}}}" for kind, n in single if not sections_of(kind.model_fields[n])]
    listed = not isinstance(key.loc[-1], int) and (not kinds or is_list_of_sections(key.field))
    if listed and isinstance(value, dict) and any(str(name).isdecimal() for name in value):
        return []  # an override of a list's entry that does not exist
    return [f"[{shape}]" if listed else shape for shape in shapes]


def _fitting(kind: type[Section], value: Any) -> list[str]:
    """The keys of a section for which a value may be meant: its only one, or those that accept it."""
    if len(kind.model_fields) == 1:
        return list(kind.model_fields)
    found = []
    for name, field in kind.model_fields.items():
        with suppress(ValidationError):
            TypeAdapter(Annotated[field.annotation, field]).validate_python(value)  # type: ignore[arg-type]
            found.append(name)
    return found


def _in_yaml(value: Any) -> str:
    """A value on one line, as a recipe would have it."""
    text: str = yaml.safe_dump([value], default_flow_style=True, width=1 << 30, sort_keys=False)
    return text.strip()[1:-1]


def _given(loc: Loc, value: Any, tree: Entry) -> str:
    """The value as it was written; with a variable of the environment, its value and how it was written."""
    written = _written(loc, value, tree)
    given, source = (value, f" (from {written})") if "${" in str(written) else (written, "")
    text = repr(list(given) if isinstance(given, tuple) else given)
    text = {"None": "nothing", "True": "true", "False": "false"}.get(text, text)
    return (text if len(text) <= 80 else text[:77] + "…") + source


def _written(loc: Loc, value: Any, tree: Entry) -> Any:
    """A scalar as it was written, before variables were read and paths made absolute; else `value`."""
    entry = find(tree, loc)
    if entry is None or isinstance(entry.value, (dict, list)):
        return value
    return entry.value.text if isinstance(entry.value, Variable) else entry.value


def _two_kinds(key: Key, value: Mapping[str, Any], tree: Entry) -> str:
    """One line for a section with the keys of several kinds, at the last of them that was written."""
    names = [name for name in kinds_of(key.field) if value.get(name) is not None]
    origins = {name: origin_of(tree, (*key.loc, name)) for name in names}
    last = next((name for name in names if origins[name].override), names[-1])
    other = next(name for name in names if name != last)
    hint = f": null removes the other, as in {key.path}.{other}=null" if origins[last].override else ""
    message = f"has {' and '.join(names)}; should have exactly one of them{hint}"
    return origins[last].problem(f"{key.path}.{last}", message)


def _no_kind(key: Key, value: Mapping[str, Any]) -> str:
    """The message for a section without a key by which its kind is recognised."""
    kinds = kinds_of(key.field)
    known = {name for kind in kinds.values() for name in kind.model_fields}
    for name in value:
        near = nearest(name, kinds) if name not in known else None
        if near:
            return f"unknown key {name}; did you mean {key.path}.{near}?"
    return f"should have exactly one of the keys {', '.join(kinds)}"


def _unknown(key: Key, root: type[Section]) -> str:
    """The message for an unknown key: of another kind, near a known one here or elsewhere, else all here."""
    word, around = str(key.loc[-1]), dotted(key.loc[:-1])
    known = list(key.around.model_fields)
    for name, kind in key.kinds.items():
        if word in kind.model_fields:
            return f"belongs to {around} with the key {name}; here it has the keys {', '.join(known)}"
    prefix = f"{around}." if around else ""
    everywhere = {path[-1]: ".".join(path).replace("*", "0") for path, _ in reversed(list(walk(root)))}
    below = next((path for path, _ in walk(key.around) if path[-1] == word), None)
    near = ".".join(below).replace("*", "0") if below else nearest(word, known)
    if near:
        return f"unknown key; did you mean {prefix}{near}?"
    meant = f"did you mean {everywhere[word]}? " if word in everywhere else ""
    if meant and not around:
        return f"unknown key; {meant.strip()}"
    return f"unknown key; {meant}{around or 'a recipe'} has the keys {', '.join(known)}"
