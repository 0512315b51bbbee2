"""A rank that no longer gets ahead: real processes that are stopped, or wait for what never comes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clipcluster.runs.folder import Run
from clipcluster.runs.merge import events
from clipcluster.runtime.pulse import BATCH, FEATURES, Pulse
from clipcluster.train.watchdog import OTHERWISE_SECONDS, Watchdog, behind

SCRIPT, ROOT = Path(__file__).with_name("watched.py"), Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "toy-00000000", {"name": "toy"}, {})
    run.claim("1", host="here", still_running=lambda job: False)
    return run


@pytest.fixture
def watched(run: Run) -> Iterator[Callable[..., list[subprocess.Popen[bytes]]]]:
    """Start the ranks of watched.py and wait until they have done 15 steps."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*more: str) -> list[subprocess.Popen[bytes]]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        for rank in range(3):
            command = [sys.executable, str(SCRIPT), str(run.path), str(rank), *more]
            started.append(subprocess.Popen(command, env=environment))
        deadline = time.monotonic() + 30
        while not (run.attempt(1).path / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


def log(run: Run, rank: int) -> str:
    return (run.attempt(1).path / f"rank-{rank}.out").read_text()


def stalled(run: Run) -> dict[str, Any]:
    (event,) = [event for event in events(run) if event["event"] == "stalled"]
    return event


def test_a_stopped_rank_is_named_by_the_others(run: Run, watched: Any) -> None:
    ranks = watched()
    ranks[1].send_signal(signal.SIGSTOP)
    assert [ranks[rank].wait(20) for rank in (0, 2)] == [94, 94]
    assert ranks[1].poll() is None
    event = stalled(run)
    assert (event["ranks"], event["nodes"], event["doing"]) == ([1], ["n1"], ["silent"])
    assert event["attempt"] == 1
    assert event["step"] >= 15
    assert 1 <= event["seconds"] < 3
    assert run.attempt(1).outcome() is None, "the verdict requeues what ends without an outcome"
    for rank in (0, 2):
        assert "waiting for the other ranks, between two steps" in log(run, rank)
        assert "in agree\n" in log(run, rank), "the stacks"
    assert f"process {ranks[1].pid} is stopped" in log(run, 0) + log(run, 2)


@pytest.mark.long
def test_a_disk_that_hangs_is_named_by_its_own_rank(run: Run, watched: Any, tmp_path: Path) -> None:
    fifo = tmp_path / "batches"
    os.mkfifo(fifo)
    ranks = watched(str(fifo))
    assert [rank.wait(20) for rank in ranks] == [94, 94, 94]
    event = stalled(run)
    assert (event["ranks"], event["nodes"], event["doing"]) == ([1], ["n1"], [BATCH])
    assert event["reason"].endswith("rank 1 on n1: waiting for a batch")
    assert "in next_batch\n" in log(run, 1)
    if shutil.which("py-spy"):
        assert "(libc.so" in log(run, 1), "native frames"


@pytest.mark.long
def test_a_rank_that_keeps_the_interpreter_for_itself_leaves_its_stacks(run: Run, watched: Any) -> None:
    """Its watchdog gets no turn: the others name it, and a thread that needs no interpreter writes them."""
    ranks = watched("interpreter")
    assert [ranks[rank].wait(20) for rank in (0, 2)] == [94, 94]
    assert (stalled(run)["ranks"], stalled(run)["doing"]) == ([1], ["silent"])
    deadline = time.monotonic() + 20
    while "in next_batch\n" not in log(run, 1) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "Timeout (" in log(run, 1)
    assert ranks[1].poll() is None


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ({0: (7, 4), 1: (7, 4), 2: (6, 0)}, [2]),
        ({0: (7, 4), 2: (7, 4)}, [1]),
        ({0: (7, 2), 1: (7, 0), 2: (7, 0)}, [1, 2]),
        ({0: (7, 2), 1: (7, 2), 2: (7, 2)}, [0, 1, 2]),
        ({2: (6, 0)}, [0, 1]),
    ],
)
def test_who_holds_up_the_others(places: dict[int, tuple[int, int]], expected: list[int]) -> None:
    reports = {rank: {"step": step, "place": place} for rank, (step, place) in places.items()}
    assert behind(reports, 3) == expected


def test_the_patience_follows_the_median_step(run: Run) -> None:
    pulse = Pulse()
    watchdog = Watchdog(pulse, run.attempt(1), 0, 1, 300)
    pulse.begin(BATCH)
    assert watchdog.patience() == OTHERWISE_SECONDS, "the first steps may compile"
    pulse.step_seconds.extend([2.0] * 5 + [90.0])
    assert watchdog.patience() == 300
    pulse.step_seconds.extend([40.0] * 9)
    assert watchdog.patience() == 800
    pulse.begin("evaluating")
    assert watchdog.patience() == OTHERWISE_SECONDS
    pulse.restart(FEATURES)
    assert watchdog.patience() == OTHERWISE_SECONDS


def test_a_sign_of_life_keeps_a_rank_alive(run: Run) -> None:
    """In this very process: it would not come to the end of the test."""
    pulse = Pulse()
    pulse.step_seconds.extend([0.01] * 5)
    pulse.begin(BATCH)
    watchdog = Watchdog(pulse, run.attempt(1), 0, 1, 0.2)
    watchdog.start()
    for _ in range(6):
        time.sleep(0.1)
        pulse.beat()
    watchdog.close()
    time.sleep(0.4)
    assert not (run.attempt(1).path / "stalled").exists()
