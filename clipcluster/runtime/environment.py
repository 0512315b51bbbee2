"""Environment variables by which the batch script, the ranks and a user tell each other things."""

from __future__ import annotations

import os
import socket

ATTEMPT = "CLIPCLUSTER_ATTEMPT"  # number of the attempt that the batch script claimed for this job
TAKE_OVER = "CLIPCLUSTER_TAKE_OVER"  # id of a job that the user knows to have ended
INTERFACE = "CLIPCLUSTER_INTERFACE"  # network interface by which the site's nodes reach each other
LOGS = "CLIPCLUSTER_LOGS"  # folder of submitit's files
LEAD = "CLIPCLUSTER_LEAD"  # seconds before the time limit at which the ranks are asked to stop
BEGAN = "CLIPCLUSTER_BEGAN"  # when the batch script began, in seconds since 1970
GRACE = "CLIPCLUSTER_GRACE"  # seconds from the signal of a preemption to the kill
ENDS = "CLIPCLUSTER_ENDS"  # the time limit of this attempt, in seconds since 1970
EARLY_SECONDS = 90  # SLURM may send the signal of the lead time a minute early, and looks every half minute


def node_name() -> str:
    """This machine as SLURM calls it, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def share_cores() -> None:
    """Let idle OpenMP threads sleep instead of spinning; torch must not be loaded yet.

    Threads that spin while they wait take the cores from the threads they wait for: beside one other busy
    process a rank with two threads on two cores was 13 times slower. A variable set by the user stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
