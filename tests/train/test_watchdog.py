"""A rank without progress: real processes that are stopped, or wait for what never comes."""

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

from clipcluster.run import SILENCE_S
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import events
from clipcluster.runtime import stacks
from clipcluster.runtime.pulse import BATCH, BETWEEN, FEATURES, GRADIENTS, Pulse
from clipcluster.train.watchdog import (
    AT_MOST_SECONDS,
    AWAITED_SECONDS,
    OTHERWISE_SECONDS,
    Reports,
    Watchdog,
    behind,
)

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


def wait_until(true: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
    assert event["silent"] is True
    assert event["attempt"] == 1
    assert event["step"] >= 15
    assert 1 <= event["seconds"] < 3
    assert run.attempt(1).outcome() is None, "the verdict requeues what ends without an outcome"
    for rank in (0, 2):
        assert "waiting for the other ranks, between two steps" in log(run, rank)
        assert "in agree\n" in log(run, rank), "the stacks"
    assert f"process {ranks[1].pid} is stopped" in log(run, 0) + log(run, 2)


def test_nobody_leaves_while_another_rank_still_reports(run: Run, watched: Any) -> None:
    """SLURM kills what is left of a step once one of its ranks has failed."""
    (run.attempt(1).path / "stalled/collectives-2.json").mkdir(parents=True)
    ranks = watched("late")
    ranks[1].send_signal(signal.SIGSTOP)
    assert ranks[0].wait(20) == 94
    assert "could not be recorded" in log(run, 2), "and the rest is, all the same"
    assert "native frames" in log(run, 2)
    assert ranks[2].wait(20) == 94


@pytest.mark.long
def test_a_disk_that_hangs_is_named_by_its_own_rank(run: Run, watched: Any, tmp_path: Path) -> None:
    fifo = tmp_path / "batches"
    os.mkfifo(fifo)
    ranks = watched(str(fifo))
    assert [rank.wait(20) for rank in ranks] == [94, 94, 94]
    event = stalled(run)
    assert (event["ranks"], event["nodes"], event["doing"]) == ([1], ["n1"], [BATCH])
    assert event["silent"] is False, "its node is not to blame: others may use the disk too"
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


@pytest.mark.long
def test_ranks_that_get_ahead_again_go_on(run: Run, watched: Any) -> None:
    """The third is continued while the others still wait for its report."""
    ranks = watched()
    ranks[1].send_signal(signal.SIGSTOP)
    wait_until(lambda: len(list(run.attempt(1).path.glob("stalled/rank-*.json"))) == 2)
    ranks[1].send_signal(signal.SIGCONT)
    wait_until(lambda: all("makes progress again" in log(run, rank) for rank in (0, 2)))
    time.sleep(0.5)
    assert [rank.poll() for rank in ranks] == [None] * 3
    assert not [event for event in events(run) if event["event"] == "stalled"]
    assert not list(run.attempt(1).path.glob("stalled/rank-*.json")), "another stall has reports of its own"


def test_a_rank_that_got_ahead_is_not_taken_for_silent_in_the_same_stall(tmp_path: Path) -> None:
    first, second = Reports(tmp_path, 3, 2.0), Reports(tmp_path, 3, 2.0)
    second.write(2, {"step": 6, "place": 0})
    second.withdraw(2)
    first.write(0, {"step": 7, "place": 4})
    assert first.silent() == [1]
    assert first.read() == {0: {"step": 7, "place": 4}, 2: {"step": 6, "place": 0}}
    began = time.monotonic()
    first.leave(0)
    assert time.monotonic() - began < 1, "it needs not wait for a rank that goes on"

    earlier = (tmp_path / "rank-0.json").stat().st_mtime - 4.1
    os.utime(tmp_path / "ahead-2.json", (earlier, earlier))
    assert first.silent() == [1, 2], "it got ahead in an earlier stall"
    assert first.read() == {0: {"step": 7, "place": 4}}
    second.write(2, {"step": 9, "place": 1})
    assert first.silent() == [1]
    assert first.read()[2] == {"step": 9, "place": 1}


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
    beside_others = Watchdog(pulse, run.attempt(1), 0, 2, 300)
    pulse.begin(BATCH)
    assert watchdog.patience() == OTHERWISE_SECONDS, "the first steps may compile"
    pulse.step_seconds.extend([2.0] * 5 + [90.0])
    assert watchdog.patience() == 300
    pulse.step_seconds.extend([40.0] * 9)
    assert watchdog.patience() == 800
    assert beside_others.patience() == AT_MOST_SECONDS < SILENCE_S - AWAITED_SECONDS
    assert Watchdog(pulse, run.attempt(1), 0, 2, 500).patience() == 500, "as the recipe wants it"
    pulse.begin("evaluating")
    assert watchdog.patience() == OTHERWISE_SECONDS
    pulse.restart(FEATURES)
    assert watchdog.patience() == OTHERWISE_SECONDS


def test_a_sign_of_life_keeps_a_rank_alive(run: Run) -> None:
    """In this very process: it would not come to the end of the test."""
    pulse = Pulse()
    pulse.step_seconds.extend([0.01] * 5)
    pulse.begin(BATCH)
    with Watchdog(pulse, run.attempt(1), 0, 1, 0.2):
        for _ in range(6):
            time.sleep(0.1)
            pulse.beat()
    time.sleep(0.4)
    assert not (run.attempt(1).path / "stalled").exists()


def test_how_far_a_rank_is_in_its_step() -> None:
    """A process that queues its steps on a device may be anywhere in one while the device is stuck."""
    places = {}
    for queues in (False, True):
        pulse = Pulse(queues=queues)
        pulse.begin(BATCH)
        places[queues] = [pulse.place]
        for doing in (FEATURES, GRADIENTS, BETWEEN):
            pulse.begin(doing)
            places[queues].append(pulse.place)
        with pulse.with_others():
            places[queues].append(pulse.place)
        pulse.begin("saving a checkpoint")
        places[queues].append(pulse.place)
        with pulse.with_others():
            places[queues].append(pulse.place)
    assert places == {False: [0, 1, 2, 3, 4, 1, 4], True: [0, 1, 1, 1, 1, 1, 4]}


def test_steps_that_compiled_do_not_count_as_long() -> None:
    pulse = Pulse()
    assert pulse.long_seconds == 0.0
    pulse.step_seconds.extend([90.0, 2.0])
    assert pulse.long_seconds == 2.0
    pulse.step_seconds.extend([2.0, 2.1, 2.2, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert pulse.long_seconds == 2.2


def test_only_who_listens_is_asked_for_its_stacks() -> None:
    with subprocess.Popen(["sleep", "60"]) as deaf:
        assert not stacks._listens(deaf.pid), "the signal would kill it"
        deaf.kill()
