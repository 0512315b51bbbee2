"""The container of the ranks: what stands on srun's line before their Python.

The batch script stays on the node: it claims, judges and requeues, so that the image needs no SLURM program.
Inside, the ranks need the run's folder and nothing else of clipcluster, which runs from there.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from clipcluster.errors import UserError
from clipcluster.recipe.sections.cluster import Cluster, Container
from clipcluster.runtime.environment import LOGS
from clipcluster.runtime.stop import holding_signals

# In words of the batch script, whose working directory is the code in the run's folder.
_RUN, _CODE = "${PWD%/*}", "$PWD"
_PATH = "PYTHONPATH"


def before_python(cluster: Cluster, names: Iterable[str]) -> str:
    """The words of srun's line from its own arguments up to the Python of the ranks, for the shell.

    They hold a rank's signals back until it handles them. `names`: variables that the image must not replace.
    """
    container = cluster.container
    if container is None:
        return shlex.join(holding_signals(sys.executable))
    words = _apptainer(container, cluster.gpus_per_node > 0)
    if container.runtime == "pyxis":
        words = _pyxis(container, [_PATH, *names])
    return " ".join([*words, shlex.join(holding_signals(container.python))])


def refuse_folder(cluster: Cluster, folder: Path) -> None:
    """UserError for a folder that cannot be mounted: its name would be taken apart."""
    if cluster.container is not None and (found := re.search("[:,]", str(folder))):
        raise UserError(
            f"{folder}: a container cannot mount a folder with {found[0]!r} in its path; give another one, "
            "or leave cluster.container out"
        )


def writing_to(cluster: Cluster, folder: Path) -> Cluster:
    """The section, its container with this folder mounted, too, which is made.

    What ranks write to a folder that is not mounted is refused, or lost with the container.
    """
    container = cluster.container
    if container is None:
        return cluster
    refuse_folder(cluster, folder)
    folder.mkdir(parents=True, exist_ok=True)
    mounts = tuple(dict.fromkeys([*container.mounts, str(folder)]))
    return cluster.model_copy(update={"container": container.model_copy(update={"mounts": mounts})})


def lines(cluster: Cluster, names: Iterable[str]) -> list[str]:
    """Lines of the batch script, after the variables are set: apptainer is told which ones come first.

    Else a variable of the same name in the image would replace it (apptainer's user guide, "Environment").
    """
    if cluster.container is None or cluster.container.runtime != "apptainer":
        return []
    return [f'export APPTAINERENV_{name}="${name}"' for name in (_PATH, *names)]


def _apptainer(container: Container, gpus: bool) -> list[str]:
    """`apptainer exec`, a program that srun starts. --nv brings NVIDIA's driver in; elsewhere it warns."""
    mounts = [f'"{word}"' for word in (_RUN, f"${LOGS}")] + [shlex.quote(each) for each in container.mounts]
    return [
        f'apptainer exec --pwd "{_CODE}"',
        *(f"--bind {mount}" for mount in mounts),
        *(["--nv"] if gpus else []),
        *map(shlex.quote, [*container.arguments, container.image]),
    ]


def _pyxis(container: Container, names: Sequence[str]) -> list[str]:
    """Further arguments of srun, which the plugin pyxis reads."""
    own = [f'"{word}:{word}"' for word in (_RUN, f"${LOGS}")]
    mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts]
    return [
        shlex.quote(f"--container-image={container.image}"),
        f'--container-workdir="{_CODE}"',
        f"--container-mounts={','.join([*own, *map(shlex.quote, mounts)])}",
        f"--container-env={','.join(names)}",
        *map(shlex.quote, container.arguments),
    ]
