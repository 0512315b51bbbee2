"""YAML as a tree in which every entry knows the file and line, or the override, that wrote it.

Scalars follow YAML 1.2's core rules, not PyYAML's: ``7e-4`` is a number, ``1:30`` and ``no`` are strings, and
``1_000`` is a number too. A duplicate key is refused. No torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
        """A message of one line: the place, the key, what is wrong with it."""
        if self.override is not None:
            return f"{self.place}: {self.override}: {message}"
        return f"{self.place}: {dotted}: {message}" if dotted else f"{self.place}: {message}"


@dataclass
class Leaf:
    """A scalar: its text as written, and whether it was written without quotes."""

    text: str
    bare: bool
    origin: Origin


@dataclass
class Value:
    """A scalar with its final value: nothing in it is expanded."""

    value: Plain
    origin: Origin


@dataclass
class Branch:
    """A mapping; `marks` tells where each of its keys was written."""

    entries: dict[str, Tree]
    marks: dict[str, Origin]
    origin: Origin


@dataclass
class Row:
    """A list."""

    entries: list[Tree]
    origin: Origin


Tree = Leaf | Value | Branch | Row


def tree_of(value: Any, origin: Origin) -> Tree:
    """Mappings, lists and final values as a tree, every entry with the same origin."""
    if isinstance(value, Mapping):
        entries = {name: tree_of(entry, origin) for name, entry in value.items()}
        return Branch(entries, dict.fromkeys(entries, origin), origin)
    if isinstance(value, (list, tuple)):
        return Row([tree_of(entry, origin) for entry in value], origin)
    return Value(value, origin)


def is_null(tree: Tree | None) -> bool:
    """Whether there is nothing at a place: no entry, or null."""
    if isinstance(tree, Leaf):
        return tree.bare and read_scalar(tree.text) is None
    return tree is None or (isinstance(tree, Value) and tree.value is None)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most similar to `word`; None where none is similar."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def shown(path: Path) -> str:
    """A path for messages: relative where it lies below the working directory."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def parse_file(path: Path) -> Branch:
    """Read a YAML file whose top level is a mapping; UserError with file and line for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(path)}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read: {error.strerror}") from None
    node = _compose(text, shown(path), None)
    tree = None if node is None else _convert(node, shown(path), None)
    if tree is None or is_null(tree):
        raise UserError(f"{shown(path)} is empty; write at least one key, such as name: my-run")
    if not isinstance(tree, Branch):
        raise UserError(tree.origin.problem("", "should be a mapping (key: value) at its top level"))
    return tree


def parse_override(text: str) -> tuple[list[str], Tree]:
    """Split ``a.b.0.c=value`` into its path and its value, which is YAML; UserError says what is wrong."""
    dotted, equals, value = text.partition("=")
    path = [part.strip() for part in dotted.split(".")]
    if not equals or not all(path):
        raise UserError(f"{COMMAND_LINE}: {text}: write key=value, such as optim.lr=3e-4")
    origin = Origin(COMMAND_LINE, text)
    node = _compose(value, "", text)
    return path, Leaf("", True, origin) if node is None else _convert(node, "", text)


def _compose(text: str, file: str, override: str | None) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        if override is not None:
            message = f"the value is not YAML: {why}; put it in quotes, such as 'key=\"text\"'"
            raise UserError(Origin(COMMAND_LINE, override).problem("", message)) from None
        line = mark.line + 1 if mark is not None else 1
        if mark is not None and text[mark.index : mark.index + 1] == "\t":
            raise UserError(f"{file}:{line}: a tab character; YAML takes spaces instead") from None
        raise UserError(f"{file}:{line}: not YAML: {why}") from None


def _convert(node: yaml.Node, file: str, override: str | None, within: frozenset[int] = frozenset()) -> Tree:
    if override is None:
        origin = Origin(f"{file}:{node.start_mark.line + 1}")
    else:
        origin = Origin(COMMAND_LINE, override)
    if node.tag not in _TAGS:
        raise UserError(origin.problem("", f"YAML tags are not allowed here ({node.tag}); leave it out"))
    if id(node) in within:
        raise UserError(origin.problem("", "an alias refers to the anchor that contains it"))
    within = within | {id(node)}
    if isinstance(node, yaml.ScalarNode):
        return Leaf(node.value, node.style is None, origin)
    if isinstance(node, yaml.SequenceNode):
        return Row([_convert(entry, file, override, within) for entry in node.value], origin)
    branch = Branch({}, {}, origin)
    for name, value in node.value:
        mark = Origin(f"{file}:{name.start_mark.line + 1}") if override is None else origin
        if not isinstance(name, yaml.ScalarNode):
            raise UserError(mark.problem("", "a key should be a word, not a list or a mapping"))
        if name.value == "<<":
            raise UserError(mark.problem("", "merge keys (<<) are not supported; use extends"))
        if name.value in branch.entries:
            raise UserError(
                mark.problem(name.value, f"written twice, first at {branch.marks[name.value].place}")
            )
        branch.entries[name.value] = _convert(value, file, override, within)
        branch.marks[name.value] = mark
    return branch


def merge(below: Branch, above: Branch) -> Branch:
    """`above` over `below`: mappings are merged, everything else is replaced."""
    entries, marks = dict(below.entries), dict(below.marks)
    for name, value in above.entries.items():
        old = entries.get(name)
        both = isinstance(old, Branch) and isinstance(value, Branch)
        entries[name] = merge(old, value) if both else value  # type: ignore[arg-type]
        marks[name] = above.marks[name]
    return Branch(entries, marks, above.origin)


def assign(tree: Branch, path: list[str], value: Tree) -> None:
    """Put `value` at `path` of `tree`, creating the sections between; else UserError."""
    here: Tree = tree
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        walked = ".".join(path[:depth])
        if isinstance(here, Branch):
            absent = is_null(here.entries.get(part))
            if last:
                here.entries[part] = value
            elif absent:
                here.entries[part] = Branch({}, {}, value.origin)
            if last or absent:
                here.marks[part] = value.origin
            here = here.entries[part]
        elif isinstance(here, Row):
            if not part.isdigit() or int(part) >= len(here.entries):
                count = len(here.entries)
                allowed = f"0 to {count - 1}" if count > 1 else "0" if count else "nothing: it is empty"
                raise UserError(value.origin.problem("", f"{walked} is a list: {part!r} should be {allowed}"))
            if last:
                here.entries[int(part)] = value
            here = here.entries[int(part)]
        else:
            given = here.text if isinstance(here, Leaf) else here.value
            raise UserError(
                value.origin.problem("", f"{walked} is a value ({given}) and has no key {part!r}")
            )


def find(tree: Tree, path: Loc) -> Tree | None:
    """The entry at `path`, or None."""
    return _reach(tree, path)[0]


def origin_of(tree: Branch, path: Loc) -> Origin:
    """Where the key at `path` was written; for an absent key, where the section around it begins."""
    return _reach(tree, path)[1]


def _reach(tree: Tree, path: Loc) -> tuple[Tree | None, Origin]:
    here, origin = tree, tree.origin
    for part in path:
        if isinstance(here, Branch) and str(part) in here.entries:
            origin = here.marks[str(part)]
            here = here.entries[str(part)]
        elif isinstance(here, Row) and isinstance(part, int) and part < len(here.entries):
            here = here.entries[part]
            origin = here.origin
        else:
            return None, origin
    return here, origin


def dotted(loc: Loc) -> str:
    """``("data", "train", 0, "shards")`` as ``data.train.0.shards``."""
    return ".".join(str(part) for part in loc)


def loc_of(dotted: str) -> Loc:
    """``data.train.0.shards`` as ``("data", "train", 0, "shards")``."""
    return tuple(int(part) if part.isdigit() else part for part in dotted.split("."))
