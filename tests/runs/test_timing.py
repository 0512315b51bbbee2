"""What earlier attempts measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipcluster.runs.folder import Run
from clipcluster.runs.merge import events
from clipcluster.runs.timing import seconds_of_a_step, seconds_to_stop, suspect_nodes


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", {}, {})


def claim(run: Run) -> Any:
    return run.claim("test", host="here", still_running=lambda job: False)


def test_a_stop_takes_two_steps_and_two_saves(run: Run) -> None:
    assert seconds_to_stop(run) == 0.0
    attempt = claim(run)
    for step, rate in ((1, 8.0), (10, 32.0), (20, 32.0)):
        attempt.metrics({"step": step, "samples": 64 * step, "samples_per_second": rate})
    assert seconds_of_a_step(run) == 2.0
    assert seconds_to_stop(run) == 0.0, "no save was measured yet"
    for seconds in (9.0, 3.0):
        attempt.event("checkpoint", writer="rank-0", seconds=seconds)
    claim(run)  # an attempt without a line yet
    assert seconds_to_stop(run) == 2 * 2.0 + 2 * 9.0


def test_nodes_that_were_slow_or_stalled_in_several_attempts(run: Run) -> None:
    for kind, nodes in (("slow", ["n2", "n3"]), ("stalled", ["n2"]), ("slow", []), ("stalled", ["n1", "n3"])):
        attempt = claim(run)
        for _ in range(2):
            attempt.event(kind, writer="rank-0", ranks=[1], nodes=nodes)
    assert suspect_nodes(events(run)) == {"n2": [1, 2], "n3": [1, 4]}
