"""What the ranks of a container will not see of the paths in a recipe. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from clipcluster.recipe.load import Loaded
from clipcluster.text import counted

_IMAGE = "cluster.container.image"


def warnings(loaded: Loaded) -> list[str]:
    """Paths outside of every folder that is mounted where it is, and an image that is not on this machine."""
    container = loaded.recipe.cluster.container
    if container is None:
        return []
    found = []
    image = loaded.paths.get(_IMAGE)
    if image is not None and not os.path.exists(image):
        found.append(f"{loaded.place(_IMAGE)}: {image} does not exist on this machine")
    mounts = [mount.split(":") for mount in container.mounts]
    inside = [Path(mount[0]) for mount in mounts if mount[0] == mount[min(1, len(mount) - 1)]]
    if container.runtime == "apptainer":  # mounts it by itself, unless the site forbids it
        inside.append(Path.home())
    hidden = {
        key: path
        for key, path in loaded.paths.items()
        if path.startswith("/")
        and key != _IMAGE
        and not any(Path(path).is_relative_to(one) for one in inside)
    }
    if hidden:
        key, path = next(iter(hidden.items()))
        more = f", and {counted(len(hidden) - 1, 'other path')}" if len(hidden) > 1 else ""
        found.append(
            f"cluster.container.mounts: {key} ({path}{more}) is in no folder that is mounted at the same "
            "path; add the folder, unless the site mounts it by itself"
        )
    return found
