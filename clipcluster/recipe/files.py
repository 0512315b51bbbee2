"""The files of a recipe: itself, those it extends, and the site's profile. No torch.

A site profile has what a cluster needs in every recipe (partition, account, setup lines, …): a YAML file with
a `cluster` section, `NAME.yaml` among the shipped recipes (``recipes/sites``) or in the user's own folder
(``~/.config/clipcluster/sites``). The recipe and the command line override it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from clipcluster.errors import UserError
from clipcluster.recipe.environment import expanded
from clipcluster.recipe.tree import Entry, merge, parse_file, shown
from clipcluster.text import did_you_mean, nearest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
_EXAMPLE = "example"  # a site profile that shows the keys; used only by name


def existing(path: Path) -> Path:
    """The path of a recipe; UserError, with the nearest name, where there is no such file."""
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder; a recipe is a YAML file")
    names = _yaml_names(path.parent)
    named = path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml"
    shipped = [folder / named for folder in (path.parent, path.parent / "recipes", RECIPES)]
    near = next((file for file in shipped if file.is_file()), None)
    if near is None and (similar := nearest(path.name, names)):
        near = path.parent / similar
    if near:
        hint = f"did you mean {near}?"
    elif not path.parent.is_dir():
        hint = f"the folder {path.parent} does not exist"
    else:
        folder = "this folder" if path.parent == Path() else str(path.parent)
        hint = f"{folder} has {', '.join(names[:10]) or 'no recipe'}"
    raise UserError(f"{path}: no such recipe; {hint}")


def _yaml_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.glob("*.y*ml"))


def with_parents(file: Path, environ: Mapping[str, str], children: tuple[Path, ...] = ()) -> Entry:
    """The file's tree merged over that of the file it extends, recursively."""
    chain = (*children, file.resolve())
    if file.resolve() in children:
        circle = " -> ".join(map(shown, chain))
        raise UserError(f"{shown(file)}: extends forms a circle: {circle}")
    tree = parse_file(file)
    parent = tree.entries.pop("extends", None)
    if parent is None:
        return tree
    name = None if isinstance(parent.value, (dict, list)) else expanded(parent, environ, "extends")
    if not isinstance(name, str):
        raise UserError(parent.origin.problem("extends", "should be the name of one file"))
    folders = dict.fromkeys((file.parent.resolve(), RECIPES))
    for folder in folders:
        if (folder / name).is_file():
            return merge(with_parents(folder / name, environ, chain), tree)
    where = " and ".join(map(shown, folders))
    near = did_you_mean(name, [known for folder in folders for known in _yaml_names(folder)])
    raise UserError(parent.origin.problem("extends", f"{name} does not exist (looked in {where}){near}"))


def user_folder(environ: Mapping[str, str]) -> Path:
    """The folder of the user's own site profiles."""
    home = environ.get("HOME") or os.path.expanduser("~")
    return Path(environ.get("XDG_CONFIG_HOME") or f"{home}/.config") / "clipcluster" / "sites"


def known_sites(environ: Mapping[str, str]) -> dict[str, Path]:
    """Every profile by name; the user's own replace shipped ones of the same name."""
    folders = (RECIPES / "sites", user_folder(environ))
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def find_site(name: str | None, environ: Mapping[str, str]) -> Entry | None:
    """The profile called `name`; without a name the only one there is (not counting the example), else None.

    Raises:
        UserError: no such profile, or one with another section than cluster.
    """
    known = known_sites(environ)
    if name is None:
        names = [site for site in known if site != _EXAMPLE]
        if len(names) != 1:
            return None
        name = names[0]
    if name not in known:
        near = nearest(name, known)
        hint = f"did you mean {near}?" if near else f"known: {', '.join(sorted(known)) or 'none'}"
        raise UserError(f"no site profile is called {name}; {hint} (your profiles: {user_folder(environ)})")
    tree = parse_file(known[name])
    for key, entry in tree.entries.items():
        if key != "cluster":
            raise UserError(entry.origin.problem(key, "a site profile has only the section cluster"))
    return tree
