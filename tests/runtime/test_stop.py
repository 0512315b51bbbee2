"""Signals set a flag, and nothing else happens."""

import os
import signal
import subprocess
import sys
import time

import pytest

from clipcluster.runtime.stop import Stop, Wish, holding_signals

# Says what it caught after a signal that arrives while it is busy importing.
CATCHER = """
import sys, time
from clipcluster.runtime.stop import Stop
stop = Stop()
stop.install(interactive=sys.argv[1] == "interactive")
print("ready", flush=True)
import sqlite3, asyncio, xml.dom.minidom
end = time.monotonic() + 20
while not stop.requested and time.monotonic() < end:
    time.sleep(0.01)
print(stop.signal, int(stop.wishes()), "torch" in sys.modules, flush=True)
"""


def catch(number, mode, blocked=()):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)  # the child inherits it
    try:
        process = subprocess.Popen([sys.executable, "-c", CATCHER, mode], stdout=subprocess.PIPE, text=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    process.stdout.readline()
    process.send_signal(number)
    return process.communicate(timeout=30)[0].strip(), process.returncode


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_is_noted(name):
    assert catch(getattr(signal, name), "slurm") == (f"{name} 1 False", 0)


def test_a_signal_that_the_parent_had_blocked_is_noted():
    assert catch(signal.SIGTERM, "slurm", blocked=[signal.SIGTERM]) == ("SIGTERM 1 False", 0)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
@pytest.mark.parametrize("held", [True, False])
def test_a_signal_before_the_handlers(name, held):
    """As submitit's: some time passes in its imports before the job is unpickled and its handlers stand."""
    code = "print('ready', flush=True); import time; time.sleep(0.5)" + CATCHER
    command = holding_signals(sys.executable) if held else [sys.executable]
    process = subprocess.Popen([*command, "-u", "-c", code, "slurm"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=30)[0].split()
    if held:
        assert (said, process.returncode) == (["ready", name, "1", "False"], 0)
    else:
        assert (said, process.returncode) == ([], -getattr(signal, name))


def test_interrupt_is_noted_outside_slurm_only():
    assert catch(signal.SIGINT, "interactive") == ("SIGINT 1 False", 0)
    said, code = catch(signal.SIGINT, "slurm")
    assert (said, code) != ("SIGINT 1 False", 0)


def test_the_first_signal_is_kept():
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        stop = Stop()
        assert stop.wishes() == Wish.NONE
        stop.install(interactive=False)
        os.kill(os.getpid(), signal.SIGUSR2)
        first = stop.time
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert (stop.signal, stop.reason, stop.time) == ("SIGUSR2", "SIGUSR2", first)
    assert abs(stop.time - time.time()) < 60


def test_a_request_needs_no_signal():
    stop = Stop()
    stop.request("the recipe's time is up")
    stop.request("again")
    assert stop.wishes() == Wish.STOP
    assert (stop.signal, stop.reason) == (None, "the recipe's time is up")


def test_workers_outlive_the_signals():
    code = (
        "import time; from clipcluster.runtime.stop import ignore_signals\n"
        "ignore_signals(); print('ready', flush=True); time.sleep(0.5); print('alive')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"):
        process.send_signal(getattr(signal, name))
    assert process.communicate(timeout=30)[0].strip() == "alive"
