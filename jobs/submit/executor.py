"""Where a run goes: to SLURM, or to this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from clipcluster.errors import UserError
from tools.slurm import Slurm, SlurmRefused, SlurmUnavailable

NO_CLUSTER = "configuration source"  # what SLURM's programs lack where they are installed and nothing else


def choose(asked: str | None, say: Callable[[str], None]) -> str:
    """The executor `asked` for ("slurm", "local", "none"), else SLURM where it is set up, else this machine.

    Raises UserError for --executor slurm without sbatch, and where SLURM does not answer.
    """
    if asked in ("local", "none"):
        return asked
    if asked == "slurm":
        require_slurm()
        return "slurm"
    if asked is not None:
        raise UserError(f"--executor {asked}: allowed are slurm, local and none")
    if not has_sbatch():
        say("no sbatch on the PATH: the run goes to this machine (--executor local)")
        return "local"
    if not _ask_slurm(""):
        say("sbatch is here but no cluster: the run goes to this machine (--executor local)")
        return "local"
    return "slurm"


def likely() -> str:
    """Where a submission without --executor would go; "slurm" where a cluster is silent for now."""
    try:
        return choose(None, lambda line: None)
    except UserError:
        return "slurm"


def require_slurm() -> None:
    """UserError where --executor slurm was given and no cluster can be asked."""
    if not has_sbatch():
        raise UserError(
            "--executor slurm: there is no sbatch on the PATH. Submit from a login node of the cluster, "
            "use --executor local, or start a cluster on this machine with: clipcluster sandbox start"
        )
    _ask_slurm("--executor slurm: ")


def _ask_slurm(asked: str) -> bool:
    """Whether SLURM answers; False only where no cluster is set up here and none was `asked` for.

    Raises UserError where a cluster is silent: its login node is no place to train on.
    """
    try:
        Slurm().config()
    except (SlurmUnavailable, SlurmRefused) as error:
        if NO_CLUSTER in str(error) and not asked:
            return False
        raise UserError(
            f"{asked}SLURM does not answer ({str(error).splitlines()[-1]}). Try again in a moment, check "
            "the file that SLURM_CONF names where it is set, or train on this machine with --executor local."
        ) from None
    return True


def has_sbatch() -> bool:
    """Whether sbatch is on the PATH."""
    return shutil.which("sbatch") is not None
