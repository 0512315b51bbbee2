"""What the batch script of a site check does after the ranks: as a run's verdict it asks and requeues.

    python -m jobs.sites.batch FOLDER CODE    CODE: srun's exit code; prints the script's

It runs where a run's verdict runs: on the first node, outside of any container, with the Python of the
submission. The job it requeues is cancelled by the submitter; started again, it leaves at once.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

from clipcluster.runs import files
from clipcluster.runtime.job_id import slurm_job_id
from jobs.sites.reports import BATCH
from tools.slurm import Slurm, SlurmRefused, SlurmUnavailable


def main(folder: Path, code: int, slurm: Slurm) -> None:
    """Report what scontrol says of this job, then requeue it, and report that too."""
    job_id = slurm_job_id(os.environ)
    said = {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "code": code,
        "python": sys.executable,
    }
    began = time.monotonic()
    try:
        job = slurm.job(job_id)
        said["show"] = "" if job else f"SLURM knows no job {job_id}"
    except (SlurmUnavailable, SlurmRefused) as error:
        said["show"] = str(error)
    said["seconds"] = time.monotonic() - began
    files.write_json(folder / BATCH, said)  # the requeue may end this process
    try:
        slurm.requeue(job_id)
        said["requeue"] = ""
    except (SlurmUnavailable, SlurmRefused) as error:
        said["requeue"] = str(error)
    files.write_json(folder / BATCH, said)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Slurm())
    print(sys.argv[2])
