"""Site profiles: what a cluster needs in every recipe (partition, account, setup lines, …). No torch.

A profile is a YAML file with a `cluster` section, `NAME.yaml` in the user's folder
(``$XDG_CONFIG_HOME/clipcluster/sites``, usually ``~/.config/clipcluster/sites``) or among the shipped recipes
(``recipes/sites``). The recipe and the command line override it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from clipcluster.errors import UserError
from clipcluster.recipe.tree import Branch, nearest, parse_file

SHIPPED = Path(__file__).resolve().parents[2] / "recipes" / "sites"
_EXAMPLE = "example"  # shows the keys; used only by name


def user_folder(environ: Mapping[str, str] | None = None) -> Path:
    """The folder of the user's own profiles."""
    environ = os.environ if environ is None else environ
    config = environ.get("XDG_CONFIG_HOME") or os.path.join(
        environ.get("HOME") or os.path.expanduser("~"), ".config"
    )
    return Path(config) / "clipcluster" / "sites"


def known_sites(environ: Mapping[str, str] | None = None) -> dict[str, Path]:
    """Every profile by name; the user's own replace shipped ones of the same name."""
    found: dict[str, Path] = {}
    for folder in (SHIPPED, user_folder(environ)):
        if folder.is_dir():
            found.update({file.stem: file for file in sorted(folder.glob("*.yaml"))})
    return found


def find_site(name: str | None, environ: Mapping[str, str] | None = None) -> Branch | None:
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
    for entry in tree.entries:
        if entry != "cluster":
            raise UserError(tree.marks[entry].problem(entry, "a site profile has only the section cluster"))
    return tree
