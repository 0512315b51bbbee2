"""The lock of a submission: one holder, none left behind."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from jobs.submit import lock

HOLD = "import sys, time; from pathlib import Path; from jobs.submit import lock\n"
HOLD += "with lock.alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_one_holds_it_and_nothing_is_left(tmp_path):
    path = tmp_path / "runs" / ".lock"
    with lock.alone(path):
        with pytest.raises(lock.Held), lock.alone(path):
            pass
        assert path.exists()
    assert not path.exists()
    with lock.alone(path):
        pass


def test_a_holder_that_is_killed_lets_it_go(tmp_path):
    path = tmp_path / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(lock.Held), lock.alone(path):
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with lock.alone(path):
        pass
    assert not path.exists()


def test_a_file_system_without_locks_holds_nobody_up(tmp_path, monkeypatch):
    def without_locks(descriptor, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with lock.alone(tmp_path / ".lock"):
        pass
    assert list(tmp_path.iterdir()) == []
