"""`clipcluster status` as people type it."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from clipcluster.runs.folder import Run


def shown_on_terminal(terminal, *, times, seconds=60.0):
    """What a terminal shows until `RUN` has appeared so many times."""
    shown, deadline = b"", time.monotonic() + seconds
    while shown.count(b"watched-00000000") < times and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 65536)
    return shown.decode()


@pytest.mark.long
def test_watch_refreshes_until_it_is_interrupted(tmp_path):
    run = Run.create(tmp_path / "watched-00000000", {"name": "watched"}, {"plan": {"total_steps": 90}})
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "jobs.cli", "status", "--watch", "--runs", str(tmp_path)]
    environment = {**os.environ, "COLUMNS": "120", "LINES": "30", "TERM": "xterm"}
    watching = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment)
    first = shown_on_terminal(ours, times=1)
    assert "NEW" in first
    attempt = run.claim("17", host="n1", still_running=lambda job: False)
    attempt.event("fail", writer="verdict", ending="failed", code=90, reason="disk full")
    later = shown_on_terminal(ours, times=1)
    assert "FAILED" in later
    assert "disk full" in later
    watching.send_signal(signal.SIGINT)
    assert watching.wait(20) == 0
    assert "Traceback" not in first + later
