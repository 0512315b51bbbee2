"""Which processes are a sandbox's: by the logs its daemons hold, by the environment of its tasks."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.sandbox.config import Sandbox
from tools.sandbox.processes import Owned, owned


@pytest.mark.parametrize("removed", [False, True])
def test_a_daemon_is_known_by_its_log_whatever_became_of_the_file(tmp_path: Path, removed: bool) -> None:
    sandbox = Sandbox(tmp_path, 2, 1, 0, 1, False, "sandbox_0", 1, tmp_path / "spool", False)
    sandbox.logs.mkdir()
    daemon = shutil.copy("/bin/sleep", tmp_path / "slurmd")
    task = {**os.environ, "SLURM_CLUSTER_NAME": "sandbox_0", "SLURMD_NODENAME": "n2"}
    with (sandbox.logs / "n1.log").open("a") as log:
        processes = [
            subprocess.Popen([daemon, "60"], stdout=log),
            subprocess.Popen(["/bin/sleep", "60"], env=task),
        ]
    try:
        if removed:
            (sandbox.logs / "n1.log").unlink()
        kinds = [("slurmd", "n1"), ("task", "n2")]
        expected = [Owned(process.pid, *what) for process, what in zip(processes, kinds, strict=True)]
        assert owned(sandbox) == sorted(expected)
    finally:
        for process in processes:
            process.kill()
            process.wait()
