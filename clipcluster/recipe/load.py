"""From a YAML file to a validated recipe: extends, overrides, environment, paths; and back from a run folder.

A path (shards, weights, a tokenizer's folder, …) belongs to the recipe as it is written, ``${NAME}``
unexpanded, so that a run moved to another disk is the same run. The absolute paths are kept separately
(`Loaded.paths`); relative ones start from the working directory, as in a shell. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.recipe.environment import values
from clipcluster.recipe.files import existing, find_site, with_parents
from clipcluster.recipe.problems import validated
from clipcluster.recipe.sections.base import (
    Section,
    extra_of,
    is_list_of_sections,
    section,
    sections_of,
    walk,
)
from clipcluster.recipe.sections.chain import Chain
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.sweep import SECTION, Member, Sweep, read_sweep
from clipcluster.recipe.tree import (
    COMMAND_LINE,
    Entry,
    Origin,
    assign,
    find,
    loc_of,
    merge,
    origin_of,
    parse_override,
    shown,
    tree_of,
)

_CHAIN = ("first", "then")  # sections that are no part of the run itself


@dataclass(frozen=True)
class Loaded:
    """A valid recipe, as read.

    Attributes:
        recipe: ready for use; its paths are absolute.
        written: the same with the paths as they were written; it names the run.
        paths: dotted path of a key -> its absolute path here, or its address (hub names are absent).
        tree: every entry with the place where it was written.
        label: of a member of a sweep, what its name says of the keys that differ.
    """

    recipe: Recipe
    written: Recipe
    paths: dict[str, str]
    tree: Entry
    label: str = ""

    @property
    def title(self) -> str:
        """The first part of the run's name, before the digits of the hash."""
        return f"{self.recipe.name}-{self.label}" if self.label else self.recipe.name

    def place(self, key: str) -> str:
        """Where a key was written (``recipes/x.yaml:12: optim.lr``), for messages of later checks."""
        return origin_of(self.tree, loc_of(key)).problem(key, "")


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    *,
    site: str | None = None,
    member: Member | None = None,
) -> Loaded:
    """Read a recipe, its parents, a site profile and the command line's overrides.

    Args:
        path: the YAML file.
        overrides: ``a.b.0.c=value``, the value in YAML.
        environ: the environment for ``${NAME}``.
        site: name of the site profile; default the user's, if there is exactly one.
        member: the run of the recipe's sweep.

    Raises:
        UserError: all errors, each with file, line, dotted path and what is allowed; a sweep of which no
            member was chosen.
    """
    file, tree, section = _read(path, overrides, environ, site)
    if member is not None:
        tree = _as_member(tree, member)
    elif section is not None:
        count = len(read_sweep(section, environ).members)
        raise UserError(
            section.origin.problem(SECTION, f"a sweep of {count} runs; {SECTION}=null makes it one run")
        )
    paths: dict[str, str] = {}
    recipe = validated(tree, environ, shown(file), Recipe, paths)
    written = Recipe.model_validate(values(tree, environ, {}))
    return Loaded(recipe, written, paths, tree, member.label if member else "")


def load_sweep(
    path: str | Path,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    *,
    site: str | None = None,
) -> Sweep | None:
    """The sweep that a recipe describes, or None; arguments as of `load`, which reads each member.

    Raises:
        UserError: the files, the overrides or the section cannot be read.
    """
    _, _, section = _read(path, overrides, environ, site)
    return None if section is None else read_sweep(section, environ)


def load_chain(
    path: str | Path,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    *,
    site: str | None = None,
) -> Chain:
    """What a recipe says of what comes first and what follows; arguments as of `load`. Paths are absolute.

    Raises:
        UserError: the files or the overrides cannot be read, or one of the two sections is not valid.
    """
    file = existing(Path(path))
    tree = _with_overrides(with_parents(file, environ), overrides)
    given = {name: tree.entries[name] for name in _CHAIN if name in tree.entries}
    both = {name: entry for name, entry in given.items() if entry.value is not None}
    chain = validated(Entry(both, tree.origin), environ, shown(file), Chain)
    return chain.model_copy(
        update={name: tuple(_absolute(one) for one in getattr(chain, name)) for name in _CHAIN}
    )


def _absolute(part: Section) -> Section:
    """A part of a chain with the paths that it writes and reads made absolute."""
    found: dict[str, Any] = {}
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if extra_of(field).get("path") == "path":
            made = [os.path.abspath(os.path.expanduser(one)) for one in _texts(value)]
            found[name] = made[0] if isinstance(value, str) else tuple(made)
    return part.model_copy(update=found)


def _texts(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def _read(
    path: str | Path, overrides: Sequence[str], environ: Mapping[str, str], site: str | None
) -> tuple[Path, Entry, Entry | None]:
    """The file, its tree with parents, site profile and overrides, and apart from it the section `sweep`."""
    file = existing(Path(path))
    tree = with_parents(file, environ)
    profile = find_site(site, environ)
    tree = _with_overrides(merge(profile, tree) if profile else tree, overrides)
    section = tree.entries.pop(SECTION, None)
    for name in _CHAIN:
        tree.entries.pop(name, None)
    return file, tree, section if section is not None and section.value is not None else None


def _as_member(tree: Entry, member: Member) -> Entry:
    """The tree with a member's values. UserError for one that the command line gives, too."""
    for key, value in member.values.items():
        there = find(tree, loc_of(key))
        given = None if there is None else _from_command_line(there)
        if given is not None:
            message = f"swept; give {SECTION}.{key}=[…], or {SECTION}=null for one run"
            raise UserError(given.origin.problem("", message))
        tree = assign(tree, key.split("."), value)
    return tree


def _from_command_line(entry: Entry) -> Entry | None:
    """The entry, or one inside it, that the command line gives."""
    if entry.origin.override is not None:
        return entry
    inside = entry.value if isinstance(entry.value, list) else entry.entries.values()
    return next(filter(None, map(_from_command_line, inside)), None)


def override(recipe: Recipe, overrides: Sequence[str], environ: Mapping[str, str] = os.environ) -> Recipe:
    """A loaded recipe with overrides ``key=value``, validated, its paths made absolute as by `load`.

    Raises:
        UserError: as `load`.
    """
    name = "the run's recipe"
    tree = _with_overrides(tree_of(recipe.model_dump(mode="json"), Origin(name)), overrides)
    return validated(tree, environ, name, Recipe, {})


def from_mapping(mapping: Mapping[str, Any], name: str) -> Recipe:
    """A whole recipe that stands in another file, with absolute paths; `name` is that file in messages.

    Raises:
        UserError: it is no valid recipe, or of a newer version.
    """
    return validated(tree_of(mapping, Origin(name)), {}, name, Recipe)


def _with_overrides(tree: Entry, overrides: Sequence[str]) -> Entry:
    """A tree with each ``key=value`` in it."""
    for text in overrides:
        keys, value = parse_override(text)
        if keys == ["extends"]:
            raise UserError(value.origin.problem("", "extends can only be written in a file"))
        tree = assign(tree, keys, value)
    return tree


class _ClusterOnly(Section):
    """The recipe of a job that trains nothing."""

    cluster: Cluster = section("Where the run takes place.", {})


def load_cluster(
    overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ, *, site: str | None = None
) -> Cluster:
    """The cluster section alone, for jobs without a recipe: a site profile and overrides ``key=value``.

    ``cluster.`` before a key may be left out.

    Raises:
        UserError: as `load`.
    """
    profile = find_site(site, environ) or Entry({}, Origin(COMMAND_LINE))
    tree = profile
    for text in overrides:
        keys, value = parse_override(text.removeprefix("cluster."), example="nodes=1")
        if keys[0] in Recipe.model_fields:
            raise UserError(value.origin.problem("", "only keys of the section cluster count here"))
        tree = assign(tree, ["cluster", *keys], value)
    return validated(tree, environ, "the cluster section", _ClusterOnly, {}).cluster


def _select(
    section: Section, dumped: Mapping[str, Any], keep: Callable[[str], bool], *, full: bool
) -> dict[str, Any]:
    """The keys of a section whose mark is kept; those at their defaults only if `full`.

    dumped: the section as JSON has it.
    """
    chosen: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        inner = sections_of(field)
        if not inner:
            at_default = field.get_default(call_default_factory=True) in (value, dumped[name])
            if keep(extra_of(field)["mark"]) and (full or not at_default):
                chosen[name] = dumped[name]
        elif is_list_of_sections(field):
            if (value or full) and _decides(inner, keep):  # left out: as a key at its default
                entries = zip(value, dumped[name], strict=True)
                chosen[name] = [_select(entry, own, keep, full=full) for entry, own in entries]
        else:
            below = None if value is None else _select(value, dumped[name], keep, full=full)
            # The full form has absent sections too, since a later version may have another default.
            written = full if value is None else field.default is None
            if below or (written and _decides(inner, keep)):
                chosen[name] = below
    return chosen


def _decides(kinds: Sequence[type[Section]], keep: Callable[[str], bool]) -> bool:
    """Whether a section, in one of its kinds, has a key whose mark is kept."""
    leaves = [leaf for kind in kinds for _, leaf in walk(kind) if not sections_of(leaf)]
    return any(keep(extra_of(leaf)["mark"]) for leaf in leaves)


def _keys(loaded: Loaded, keep: Callable[[str], bool], *, full: bool) -> dict[str, Any]:
    """The keys of a recipe, as it is written, whose mark is kept."""
    return _select(loaded.written, loaded.written.model_dump(mode="json"), keep, full=full)


def result_keys(loaded: Loaded) -> dict[str, Any]:
    """The result keys that differ from their defaults, paths as written: what a run's name is the hash of."""
    return _keys(loaded, lambda mark: mark == "result", full=False)


def recipe_keys(loaded: Loaded) -> dict[str, Any]:
    """All result keys and the task's name, paths as written: what a run folder's recipe.yaml holds."""
    return _keys(loaded, lambda mark: mark == "result", full=True)


def settings_keys(loaded: Loaded) -> dict[str, Any]:
    """All speed and record keys, and ``paths`` (dotted path -> absolute path): settings.yaml."""
    return {**_keys(loaded, lambda mark: mark != "result", full=True), "paths": dict(loaded.paths)}


def from_run(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> Recipe:
    """The recipe as a job reads it back from recipe.yaml and settings.yaml, with absolute paths.

    Keys of the settings that belong to no recipe (which code folder, …) are ignored.

    Raises:
        UserError: a file was edited and is no valid recipe, or is of a newer version.
    """
    known = {name: value for name, value in settings.items() if name in Recipe.model_fields}
    origin = Origin("recipe.yaml and settings.yaml")
    tree = merge(tree_of(recipe, origin), tree_of(known, origin), lists=True)
    for name, path in settings.get("paths", {}).items():
        if find(tree, loc_of(name)[:-1]) is not None:  # a later version may have another section there
            tree = assign(tree, name.split("."), Entry(path, origin))
    return validated(tree, {}, "the run's recipe.yaml and settings.yaml", Recipe)
