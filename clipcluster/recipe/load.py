"""From a YAML file to a validated recipe: extends, overrides, environment, paths; and back from a run folder.

A path (shards, weights, a tokenizer's folder, …) belongs to the recipe as it is written, ``${NAME}``
unexpanded, so that a run moved to another disk is the same run. What it resolves to here is kept apart
(`Loaded.paths`); relative paths start from the working directory, as in a shell. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.recipe.environment import expanded, plain, resolve_paths
from clipcluster.recipe.problems import validated
from clipcluster.recipe.sections.base import Section, section
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.recipe.sections.fields import extra_of, is_list_of_sections, sections_of, walk
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.sites import find_site
from clipcluster.recipe.tree import (
    COMMAND_LINE,
    Branch,
    Leaf,
    Loc,
    Origin,
    Value,
    assign,
    find,
    loc_of,
    merge,
    nearest,
    origin_of,
    parse_file,
    parse_override,
    shown,
    tree_of,
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@dataclass(frozen=True)
class Loaded:
    """A valid recipe, as read.

    Attributes:
        recipe: ready for use; its paths are absolute.
        written: the same with the paths as they were written; it names the run.
        paths: dotted path of a key -> its absolute path here, or its address (hub names are absent).
        tree: every entry with the place that wrote it.
    """

    recipe: Recipe
    written: Recipe
    paths: dict[str, str]
    tree: Branch

    def place(self, key: str) -> str:
        """Where a key was written (``recipes/x.yaml:12: optim.lr``), for messages of later checks."""
        origin = origin_of(self.tree, loc_of(key))
        return f"{origin.place}: {key if origin.override is None else origin.override}"


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    site: str | None = None,
) -> Loaded:
    """Read a recipe, its parents, a site profile and the command line's overrides.

    Args:
        path: the YAML file.
        overrides: ``a.b.0.c=value``, the value in YAML.
        environ: the environment for ``${NAME}``; default `os.environ`.
        site: name of the site profile; default the only one of the user's, if there is exactly one.

    Raises:
        UserError: all errors, each with file, line, dotted path and what is allowed.
    """
    environ = os.environ if environ is None else environ
    file = _existing(Path(path))
    tree = _with_parents(file, environ, ())
    profile = find_site(site, environ)
    if profile is not None:
        tree = merge(profile, tree)
    _assign_all(tree, overrides)
    problems: dict[Loc, str] = {}
    written = plain(tree, environ, problems, keep_paths=True)
    recipe, paths = _resolved(tree, environ, problems, shown(file))
    return Loaded(recipe, Recipe.model_validate(written), paths, tree)


def override(recipe: Recipe, overrides: Sequence[str], environ: Mapping[str, str] | None = None) -> Recipe:
    """A loaded recipe with overrides ``key=value``, validated, its paths made absolute as by `load`.

    Raises:
        UserError: as `load`.
    """
    tree = tree_of(recipe.model_dump(mode="json"), Origin("the run's recipe"))
    assert isinstance(tree, Branch)
    _assign_all(tree, overrides)
    return _resolved(tree, os.environ if environ is None else environ, {}, "the run's recipe")[0]


def _assign_all(tree: Branch, overrides: Sequence[str], below: Sequence[str] = ()) -> None:
    """Apply ``key=value`` to a tree, or to its section `below`."""
    for text in overrides:
        keys, value = parse_override(text)
        if keys == ["extends"]:
            raise UserError(value.origin.problem("", "extends can only be written in a file"))
        assign(tree, [*below, *keys], value)


def _resolved(
    tree: Branch, environ: Mapping[str, str], problems: dict[Loc, str], name: str
) -> tuple[Recipe, dict[str, str]]:
    """The recipe of a tree with its paths absolute, and these paths by their keys."""
    value = plain(tree, environ, problems, keep_paths=False)
    paths: dict[str, str] = {}
    resolve_paths(value, (), paths)
    return validated(value, tree, problems, name, Recipe), paths


class _ClusterOnly(Section):
    """The recipe of a job that trains nothing."""

    cluster: Cluster = section("Where the run takes place.", Cluster)


def load_cluster(
    overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None, *, site: str | None = None
) -> Cluster:
    """The cluster section alone, for jobs without a recipe: a site profile and overrides ``key=value``.

    Raises:
        UserError: as `load`.
    """
    environ = os.environ if environ is None else environ
    tree = find_site(site, environ) or Branch({}, {}, Origin(COMMAND_LINE))
    _assign_all(tree, overrides, below=["cluster"])
    problems: dict[Loc, str] = {}
    resolved = plain(tree, environ, problems, keep_paths=False)
    return validated(resolved, tree, problems, "the cluster section", _ClusterOnly).cluster


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder; a recipe is a YAML file")
    names = sorted(_yaml_names(path.parent))
    near = nearest(path.name, names) or nearest(path.name + ".yaml", names)
    shipped = path.parent / "recipes" / path.name
    if near or shipped.is_file():
        hint = f"did you mean {shipped if shipped.is_file() else path.parent / str(near)}?"
    elif not path.parent.is_dir():
        hint = f"the folder {path.parent} does not exist"
    else:
        folder = "this folder" if path.parent == Path() else str(path.parent)
        hint = f"{folder} has {', '.join(names[:10])}" if names else f"{folder} has no recipe"
    raise UserError(f"{path}: no such recipe; {hint}")


def _yaml_names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.glob("*.y*ml")] if folder.is_dir() else []


def _with_parents(file: Path, environ: Mapping[str, str], children: tuple[Path, ...]) -> Branch:
    """The file's tree merged over that of the file it extends, recursively."""
    if file.resolve() in children:
        chain = " -> ".join(shown(step) for step in (*children, file.resolve()))
        raise UserError(f"{shown(file)}: extends forms a circle: {chain}")
    tree = parse_file(file)
    parent = tree.entries.pop("extends", None)
    origin = tree.marks.pop("extends", None)
    if parent is None or origin is None:
        return tree
    if not isinstance(parent, Leaf) or not isinstance(expanded(parent, environ, "extends"), str):
        raise UserError(origin.problem("extends", "should be the name of one file"))
    name = str(expanded(parent, environ, "extends"))
    for folder in (file.parent, RECIPES):
        if (folder / name).is_file():
            return merge(_with_parents(folder / name, environ, (*children, file.resolve())), tree)
    near = nearest(name, {*_yaml_names(file.parent), *_yaml_names(RECIPES)})
    hint = f"; did you mean {near}?" if near else ""
    where = (
        f"{shown(file.parent)} and {shown(RECIPES)}" if file.parent.resolve() != RECIPES else shown(RECIPES)
    )
    raise UserError(origin.problem("extends", f"{name} does not exist (looked in {where}){hint}"))


def _select(section: Section, keep: Callable[[str], bool], *, full: bool) -> dict[str, Any]:
    """The keys of a section whose mark is kept; those at their defaults only if `full`."""
    chosen: dict[str, Any] = {}
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        inner = sections_of(field)
        if not inner:
            at_default = not field.is_required() and value == field.get_default(call_default_factory=True)
            if keep(extra_of(field)["mark"]) and (full or not at_default):
                chosen[name] = values[name]
        elif is_list_of_sections(field):
            chosen[name] = [_select(entry, keep, full=full) for entry in value]
        elif value is None:
            # Left out: the full form says so, since a later version may have another default.
            if full and _decides(inner, keep):
                chosen[name] = None
        else:
            below = _select(value, keep, full=full)
            if below or (field.default is None and _decides(inner, keep)):
                chosen[name] = below
    return chosen


def _decides(kinds: Sequence[type[Section]], keep: Callable[[str], bool]) -> bool:
    """Whether a section, in one of its kinds, has a key whose mark is kept."""
    leaves = [leaf for kind in kinds for _, leaf in walk(kind) if not sections_of(leaf)]
    return any(keep(extra_of(leaf)["mark"]) for leaf in leaves)


def result_keys(loaded: Loaded) -> dict[str, Any]:
    """The result keys that differ from their defaults, paths as written: what a run's name is the hash of."""
    return _select(loaded.written, lambda mark: mark == "result", full=False)


def recipe_keys(loaded: Loaded) -> dict[str, Any]:
    """All result keys and the task's name, paths as written: what a run folder's recipe.yaml holds."""
    return _select(loaded.written, lambda mark: mark == "result", full=True)


def settings_keys(loaded: Loaded) -> dict[str, Any]:
    """All speed and record keys, and ``paths`` (dotted path -> absolute path): settings.yaml."""
    return {**_select(loaded.written, lambda mark: mark != "result", full=True), "paths": dict(loaded.paths)}


def from_run(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> Recipe:
    """The recipe as a job reads it back from recipe.yaml and settings.yaml, with absolute paths.

    Keys of the settings that belong to no recipe (which code folder, …) are ignored.

    Raises:
        UserError: a file was edited and is no valid recipe, or is of a newer version.
    """
    known = {name: value for name, value in settings.items() if name in Recipe.model_fields}
    origin = Origin("recipe.yaml and settings.yaml")
    tree = tree_of(_merged(recipe, known), origin)
    assert isinstance(tree, Branch)
    for name, path in settings.get("paths", {}).items():
        if find(tree, loc_of(name)[:-1]) is not None:  # a later version may have another section there
            assign(tree, name.split("."), Value(path, origin))
    value = plain(tree, {}, {}, keep_paths=False)
    return validated(value, tree, {}, "the run's recipe.yaml and settings.yaml", Recipe)


def _merged(below: Any, above: Any) -> Any:
    """Two halves of one recipe merged; lists of sections entry by entry."""
    if isinstance(below, Mapping) and isinstance(above, Mapping):
        both = {name: _merged(below[name], above[name]) for name in below if name in above}
        return {**below, **above, **both}
    if isinstance(below, list) and isinstance(above, list) and len(below) == len(above):
        return [_merged(one, other) for one, other in zip(below, above, strict=True)]
    return above
