"""A throwaway SLURM cluster for the tests of this folder."""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import sandbox as sandboxes
from tools.sandbox_config import ADMIN_FOLDERS, Sandbox

MISSING = (
    "SLURM tests skipped: no slurmctld on this machine (apt-get install --no-install-recommends slurm-wlm)"
)


def need_slurm() -> None:
    """Skip, with one loud line, where SLURM is not installed."""
    places = [shutil.which("slurmctld"), *(shutil.which("slurmctld", path=place) for place in ADMIN_FOLDERS)]
    if not any(places):
        warnings.warn(MISSING, stacklevel=2)
        pytest.skip(MISSING)


@pytest.fixture
def cluster(sandbox: Sandbox) -> Iterator[Sandbox]:
    """The same sandbox, left without jobs and with all its nodes up, whatever the test did to it."""
    yield sandbox
    for node in sandbox.nodes:
        sandboxes.restore_node(sandbox.folder, node)
    deadline = time.monotonic() + 30
    while (jobs := sandbox.slurm.queue()) and time.monotonic() < deadline:
        sandbox.slurm.cancel([job.job_id for job in jobs if job.state != "COMPLETING"])
        time.sleep(0.1)


@pytest.fixture(scope="session")
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """Four nodes n1 to n4 of 4 CPUs; GraceTime 10 s, KillWait 5 s; partitions low (default) and high.

    `@pytest.mark.parametrize("sandbox", [False, True], indirect=True)`: with True the site sends USR2 at a
    preemption (preempt_send_user_signal).
    """
    need_slurm()
    room = Path(tempfile.mkdtemp(prefix="clipcluster-test-", dir="/tmp"))
    folder = room / "sandbox"
    try:
        yield sandboxes.start(folder, nodes=4, user_signal=bool(getattr(request, "param", False)))
    finally:
        sandboxes.stop(folder, patience=0)
        shutil.rmtree(room, ignore_errors=True)
