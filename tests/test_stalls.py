"""A disk that hangs under a real training: shards that cannot be opened for as long as the test wants.

A process that holds a write lease on a file keeps others inside `open`, in the kernel (fcntl(2), F_SETLEASE).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipcluster.runs.folder import Run
from clipcluster.runs.merge import events, merged_metrics
from jobs.endings import history
from tests.consumed import merged_samples
from tests.tiny_run import RECIPE, write_shards

ROOT = Path(__file__).resolve().parents[1]
STEPS = 180
HOLD = """
import fcntl, os, signal, sys, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
held = 0
for path in sys.argv[1:]:
    try:
        fcntl.fcntl(os.open(path, os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)
        held += 1
    except OSError:
        pass  # a worker reads it
print(held, flush=True)
time.sleep(60)
"""


def until(true: Callable[[], Any], run: Run, seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > deadline:
            logs = run.path.glob("attempts/*/rank-*.out")
            pytest.fail("\n".join(path.read_text(errors="replace")[-3000:] for path in logs))
        time.sleep(0.02)
    return found


def submit(recipe: Path, runs: Path) -> Run:
    command = [sys.executable, "-m", "jobs.cli", "submit", str(recipe), "--executor", "local", "--quick"]
    command += ["--runs", str(runs)]
    keys = [
        "data.order={lanes: 1, window: 8, full_shuffle_below: 0}",
        "data.workers=1",
        f"train={{duration: {STEPS} steps, log_every: 1 steps, record_samples: true, stalled_after: 2 s}}",
        "checkpoint.every=20 steps",
        "evaluate={}",
        "cluster={gpus_per_node: 0, tasks_per_node: 2, cpus_per_task: 1, time: 10 min}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *keys], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (Run(path) for path in runs.iterdir() if (path / "recipe.yaml").exists())
    return run


def consumed(run: Run) -> list[tuple[Any, ...]]:
    return [(line["step"], line["slot"], line["shard"], line["key"]) for line in merged_samples(run)]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_disk_that_hangs_costs_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 800, per_shard=20)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.format(shards=shards))
    run = submit(recipe, tmp_path / "runs")
    until(lambda: run.newest() and len(merged_metrics(run)) >= 20, run)
    command = [sys.executable, "-c", HOLD, *map(str, sorted(shards.glob("*.tar")))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert int(holder.stdout.readline()) > 0
        (stalled,) = until(lambda: [one for one in events(run) if one["event"] == "stalled"], run)
        until(lambda: history.last_verdict(run.attempt(1)), run)
        holder.kill()
    verdict = history.last_verdict(run.attempt(1))
    assert verdict
    assert (verdict["event"], verdict["ending"]) == ("requeue", "stalled")
    assert stalled["doing"] == ["waiting for a batch"]
    said = "".join((run.attempt(1).path / f"rank-{rank}.out").read_text() for rank in stalled["ranks"])
    assert "opened.py" in said, "the stack of a loader worker inside of open"
    until(run.finished, run)
    assert len(run.attempts()) == 2
    twin = submit(recipe, tmp_path / "twin")
    until(twin.finished, twin)
    assert consumed(run) == consumed(twin)
    assert len(consumed(run)) == STEPS * 4
    losses = [[line["loss"] for line in merged_metrics(one)] for one in (run, twin)]
    assert losses[0] == losses[1]
