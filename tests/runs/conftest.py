"""A run folder to write to."""

import pytest

from clipcluster.runs.folder import Run


def gone(job_id):
    """No other job runs any more."""
    return False


@pytest.fixture
def run(tmp_path):
    return Run.create(
        tmp_path / "digits-00000000", {"name": "digits", "seed": 1}, {"train": {"log_every": 10}}
    )


@pytest.fixture
def claim(run):
    """Claims the next attempt for a job."""
    return lambda job="1": run.claim(job, host="n1", still_running=gone)
