"""Where a run goes, to SLURM or to this machine, and which devices it will train on there. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from clipcluster.errors import UserError
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runtime.accelerators import count_accelerators
from clipcluster.text import counted

NO_CLUSTER = "configuration source"  # what SLURM's programs lack where they are installed and nothing else


def choose(asked: str | None, say: Callable[[str], None]) -> str:
    """The executor `asked` for ("slurm", "local", "none"), else SLURM where it is set up, else this machine.

    Raises UserError for "slurm" without a cluster, and where SLURM does not answer.
    """
    if asked == "slurm":
        require_slurm()
    if asked is not None:
        return asked
    lack = _lack_of_slurm()
    if lack:
        say(f"{lack}: the run goes to this machine (--executor local)")
    return "local" if lack else "slurm"


def likely() -> str:
    """Where a submission without --executor would go; "slurm" where a cluster is silent for now."""
    try:
        return choose(None, lambda line: None)
    except UserError:
        return "slurm"


def require_slurm() -> None:
    """UserError where --executor slurm was given and no cluster can be asked."""
    lack = _lack_of_slurm()
    if lack:
        raise UserError(
            f"--executor slurm: {lack}. Submit from a login node of the cluster, "
            "use --executor local, or start a cluster on this machine with: clipcluster sandbox start"
        )


def _lack_of_slurm() -> str:
    """What of SLURM is not here; empty where it answers.

    Raises UserError where a cluster is silent: its login node is no place to train on.
    """
    if shutil.which("sbatch") is None:
        return "no sbatch on the PATH"
    from tools.slurm import Slurm, SlurmRefused, SlurmUnavailable

    try:
        Slurm().config()
    except (SlurmUnavailable, SlurmRefused) as error:
        if NO_CLUSTER in str(error):
            return "sbatch is here but no cluster"
        raise UserError(
            f"SLURM does not answer ({str(error).splitlines()[-1]}). Try again in a moment, check "
            "the file that SLURM_CONF names where it is set, or train on this machine with --executor local."
        ) from None
    return ""


def devices(cluster: Cluster, executor: str) -> str:
    """One line: the devices that the ranks will use on "slurm" or on this machine."""
    ranks = cluster.ranks_per_node
    each = counted(ranks, "rank")
    gpus = cluster.gpus_per_node
    if gpus == 0:
        return f"device: CPU, {each} per node (cluster.gpus_per_node is 0)"
    if executor == "slurm":
        return f"device: {counted(gpus, 'GPU')} per node, requested from SLURM, for {each} per node"
    here = count_accelerators()
    if here == 0:
        return f"device: CPU, {each} (this machine has no GPU)"
    used = min(here, gpus)
    return f"device: {used} of this machine's {counted(here, 'GPU')}, for {each}"


def missing_devices(cluster: Cluster) -> str:
    """Why this machine cannot give the GPUs that were explicitly requested; empty where it can."""
    gpus = cluster.gpus_per_node
    if gpus == 0 or "gpus_per_node" not in cluster.model_fields_set:
        return ""
    here = count_accelerators()
    if here >= gpus:
        return ""
    has = f"only {here}" if here else "none"
    fewer = f"cluster.gpus_per_node={here} to use those it has, " if here else ""
    return (
        f"cluster.gpus_per_node: {gpus} requested, and this machine has {has}. Give {fewer}"
        "cluster.gpus_per_node=0 to train on the CPU, or submit where SLURM is"
    )
