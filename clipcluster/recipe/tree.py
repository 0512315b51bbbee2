"""YAML as a tree whose every entry has the file and line, or the override, where it was written.

Scalars follow YAML 1.2's core schema, not PyYAML: ``7e-4`` is a number, ``1:30`` and ``no`` are strings; and
``1_000`` is a number too. A duplicate key is an error. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from clipcluster.errors import UserError

Plain = None | bool | int | float | str
Loc = tuple[str | int, ...]

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_DIGITS = r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE]))"  # a dot or an exponent: 007 is text
_FLOAT = re.compile(_DIGITS + r"([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Plain] = {"": None, "~": None, "null": None, "true": True, "false": False}
COMMAND_LINE = "from the command line"
_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


def read_scalar(text: str) -> Plain:
    """The value of an unquoted YAML scalar."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    return text


@dataclass(frozen=True)
class Origin:
    """Where an entry was written."""

    place: str  # "recipes/base.yaml:12" or COMMAND_LINE
    override: str | None = None  # "optim.lr=3"

    def problem(self, dotted: str, message: str) -> str:
        """A message of one line: the place, the key, the problem."""
        written = (self.override or "").partition("=")[0]
        return ": ".join(
            filter(None, (self.place, self.override, dotted if dotted != written else "", message))
        )


@dataclass(frozen=True)
class Variable:
    """A scalar with ``${NAME}`` in it: its text as written, and whether it was written without quotes."""

    text: str
    bare: bool

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Entry:
    """The value of a key, or of an entry of a list, and where it was written; the whole recipe is one too."""

    value: dict[str, Entry] | list[Entry] | Plain | Variable
    origin: Origin

    @property
    def entries(self) -> dict[str, Entry]:
        """The entries of a mapping; {} for anything else."""
        return self.value if isinstance(self.value, dict) else {}


def tree_of(value: Any, origin: Origin) -> Entry:
    """Mappings, lists and final values as a tree, every entry with the same origin."""
    if isinstance(value, Mapping):
        return Entry({name: tree_of(entry, origin) for name, entry in value.items()}, origin)
    if isinstance(value, (list, tuple)):
        return Entry([tree_of(entry, origin) for entry in value], origin)
    return Entry(value, origin)


def shown(path: Path) -> str:
    """A path for messages: relative where it lies below the working directory."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def parse_file(path: Path) -> Entry:
    """Read a YAML file whose top level is a mapping; UserError with file and line for anything else."""
    file = shown(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    tree = _parse(text, lambda line: Origin(f"{file}:{line}"))
    if tree.value is None:
        raise UserError(f"{file} is empty; write at least one key, such as name: my-run")
    if not isinstance(tree.value, dict):
        raise UserError(tree.origin.problem("", "should be a mapping (key: value) at its top level"))
    return tree


def parse_override(text: str, example: str = "optim.lr=3e-4") -> tuple[list[str], Entry]:
    """Split ``a.b.0.c=value`` into its path and its value, which is YAML. UserError where that fails."""
    dotted, equals, value = text.partition("=")
    path = [part.strip() for part in dotted.split(".")]
    if not equals or not all(path):
        raise UserError(f"{COMMAND_LINE}: {text}: write key=value, such as {example}")
    origin = Origin(COMMAND_LINE, text)
    return path, _parse(value, lambda line: origin, "; put it in quotes, such as 'key=\"text\"'")


def _parse(text: str, origin_of_line: Callable[[int], Origin], hint: str = "") -> Entry:
    """YAML text as a tree; UserError, with a hint, for what is not YAML or not allowed in a recipe."""
    try:
        node = _composed(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        message = f"{'the value is ' if hint else ''}not YAML: {why}{hint}"
        if mark is not None and text[mark.index : mark.index + 1] == "\t":
            message = "a tab character; YAML takes spaces instead"
        raise UserError(origin_of_line(mark.line + 1 if mark else 1).problem("", message)) from None
    return Entry(None, origin_of_line(1)) if node is None else _entry(node, origin_of_line, ())


@lru_cache(32)  # a recipe is read once for its chain, once for its sweep and once for each member
def _composed(text: str) -> yaml.Node | None:
    return yaml.compose(text, Loader=yaml.BaseLoader)


def _entry(node: yaml.Node, origin_of_line: Callable[[int], Origin], around: tuple[yaml.Node, ...]) -> Entry:
    origin = origin_of_line(node.start_mark.line + 1)
    if node.tag not in _TAGS:
        raise UserError(origin.problem("", f"YAML tags are not allowed here ({node.tag}); leave it out"))
    if node in around:
        raise UserError(origin.problem("", "an alias refers to the anchor that contains it"))
    if isinstance(node, yaml.ScalarNode):
        bare = node.style is None
        if "${" in node.value:
            return Entry(Variable(node.value, bare), origin)
        return Entry(read_scalar(node.value) if bare else node.value, origin)
    around = (*around, node)
    if isinstance(node, yaml.SequenceNode):
        return Entry([_entry(entry, origin_of_line, around) for entry in node.value], origin)
    entries: dict[str, Entry] = {}
    for name, value in node.value:
        mark = origin_of_line(name.start_mark.line + 1)
        if not isinstance(name, yaml.ScalarNode):
            raise UserError(mark.problem("", "a key should be a word, not a list or a mapping"))
        if name.value == "<<":
            raise UserError(mark.problem("", "merge keys (<<) are not supported; use extends"))
        if name.value in entries:
            first = entries[name.value].origin.place
            raise UserError(mark.problem(name.value, f"written twice, first at {first}"))
        entries[name.value] = Entry(_entry(value, origin_of_line, around).value, mark)
    return Entry(entries, origin)


def merge(below: Entry, above: Entry, *, lists: bool = False) -> Entry:
    """`above` over `below`: mappings are merged (with `lists`, lists of one length too), others replaced."""
    one, other = below.value, above.value
    if isinstance(one, dict) and isinstance(other, dict):
        both = {name: merge(one[name], other[name], lists=lists) for name in one if name in other}
        return Entry({**one, **other, **both}, above.origin)
    if lists and isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return Entry([merge(*pair, lists=True) for pair in zip(one, other, strict=True)], above.origin)
    return above


def assign(tree: Entry, path: Sequence[str], value: Entry, walked: Sequence[str] = ()) -> Entry:
    """`tree` with `value` at `path`; sections on the way are added. UserError where `path` cannot be."""
    if not path:
        return value
    part, rest, inside = path[0], path[1:], tree.value
    if inside is None:
        return assign(Entry({}, value.origin), path, value, walked)
    if isinstance(inside, dict):
        old = inside.get(part, Entry(None, value.origin))
        return Entry({**inside, part: assign(old, rest, value, (*walked, part))}, tree.origin)
    if not isinstance(inside, list):
        message = f"{'.'.join(walked)} is a value ({inside}) and has no key {part!r}"
        raise UserError(value.origin.problem("", message))
    if not part.isdecimal() or int(part) >= len(inside):
        count = len(inside)
        allowed = f"0 to {count - 1}" if count > 1 else "0" if count else "nothing: it is empty"
        message = f"{'.'.join(walked)} is a list: {part!r} should be {allowed}"
        raise UserError(value.origin.problem("", message))
    entries = list(inside)
    entries[int(part)] = assign(entries[int(part)], rest, value, (*walked, part))
    return Entry(entries, tree.origin)


def find(tree: Entry, path: Loc) -> Entry | None:
    """The entry at `path`, or None."""
    here: Entry | None = tree
    for part in path:
        inside = here.value if here else None
        if isinstance(inside, list) and isinstance(part, int) and part < len(inside):
            here = inside[part]
        else:
            here = inside.get(str(part)) if isinstance(inside, dict) else None
    return here


def origin_of(tree: Entry, path: Loc) -> Origin:
    """Where the key at `path` was written; for an absent key, where the section around it begins."""
    found = find(tree, path)
    return found.origin if found else origin_of(tree, path[:-1])


def dotted(loc: Loc) -> str:
    """``("data", "train", 0, "shards")`` as ``data.train.0.shards``."""
    return ".".join(str(part) for part in loc)


def loc_of(dotted: str) -> Loc:
    """``data.train.0.shards`` as ``("data", "train", 0, "shards")``."""
    return tuple(int(part) if part.isdecimal() else part for part in dotted.split("."))
