"""What the earlier attempts of a run tell of lost work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipcluster.runs.folder import Run
from clipcluster.runs.interruptions import Interruptions, interruptions


def attempt_of(run: Run, events: list[dict[str, Any]], logged: list[tuple[float, int]]) -> None:
    """An attempt with these events of rank 0, and lines of metrics at (time, step)."""
    attempt = run.claim("test", host="here", still_running=lambda job: False)
    for event in events:
        attempt.event(event.pop("event"), writer="rank-0", **event)
    for time, step in logged:
        attempt.metrics({"step": step, "time": time})


def opened(time: float) -> dict[str, Any]:
    return {"event": "phase", "phase": "first batch", "time": time}


def saved(time: float, step: int, **more: Any) -> dict[str, Any]:
    return {"event": "checkpoint", "time": time, "step": step, **more}


def test_steps_after_the_last_checkpoint_are_lost(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {}, {})
    assert interruptions(run, 1) == Interruptions()
    attempt_of(run, [opened(1000.0), saved(1100.0, 10, cost=0.5)], [(1050.0, 5), (1150.0, 15)])  # killed
    stopped = [opened(2000.0), saved(2100.0, 20, cost=0.7), saved(2130.0, 22)]
    attempt_of(run, stopped, [(2125.0, 22)])
    attempt_of(run, [], [])  # never trained
    attempt_of(run, [opened(3000.0), {"event": "resume", "step": 22, "time": 3000.0}], [(3010.0, 22)])
    assert interruptions(run, 2) == Interruptions(150.0, 1, (0.5,))
    assert interruptions(run, 5) == Interruptions(150.0 + 130.0 + 10.0, 1, (0.5, 0.7))
    attempt_of(run, [opened(4000.0)], [(4009.0, 24)])
    assert interruptions(run, 5).count == 1, "the attempt that asks is not over"
    assert interruptions(run, 6).count == 2


def test_damaged_records_tell_nothing(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {}, {})
    attempt_of(run, [opened(1000.0), saved(1100.0, 10, cost="much")], [(1150.0, 15)])
    path = run.attempt(1).path
    (path / "events-rank-0.jsonl").write_text('{"phase":"first batch","time":"noon"}\n{"event":"checkp')
    assert interruptions(run, 2) == Interruptions()
    (path / "metrics.jsonl").unlink()
    assert interruptions(run, 2) == Interruptions()
