"""What the batch script calls.

python -m jobs.endings claim RUN_DIR         prints the attempt's number; nothing where none is due
python -m jobs.endings verdict RUN_DIR CODE  CODE: srun's exit code; prints the script's, and leaves with it
python -m jobs.endings local RUN_DIR         the local supervisor, in place of the batch script without SLURM
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from clipcluster.errors import UserError
from clipcluster.runs.folder import AlreadyOwned, Run
from clipcluster.runtime.environment import ATTEMPT, BEGAN
from clipcluster.runtime.job_id import slurm_job_id
from clipcluster.runtime.outcome import Outcome
from jobs.endings import local
from jobs.endings.act import claim, conclude
from jobs.endings.log import say
from tools.slurm import Slurm

UNCLAIMED = 1  # the run's folder fails: the batch script leaves this node


def main(arguments: Sequence[str]) -> int:
    """See the top of this file."""
    command, run = arguments[0], Run(arguments[1])
    if command == "claim":
        try:
            claimed = claim(run, slurm_job_id(os.environ), Slurm(), began=_began(os.environ.get(BEGAN)))
        except AlreadyOwned as error:
            say(str(error))
            return int(Outcome.STALE)
        except (OSError, UserError) as error:
            say(f"{run.name} could not be claimed: {error}")
            return UNCLAIMED
        if claimed is not None:
            print(claimed.number)
        return 0
    if command == "verdict":
        attempt = run.attempt(int(os.environ[ATTEMPT]))
        code = conclude(run, attempt, int(arguments[2]), Slurm(), os.environ)
        print(int(code), flush=True)  # the script has it, whatever becomes of what this process still does
        return code
    if command == "local":
        return local.live(run)
    raise SystemExit(f"unknown: {command}")


def _began(said: str | None) -> float | None:
    """When the batch script began; None where bash did not say it in digits and a point."""
    try:
        return float(said or "") or None
    except ValueError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
