"""The loop over real ranks: what stops and resumes equals what never stopped, bit for bit.

With 4 ranks: sums over two round alike in whatever order they are taken, so two would never differ.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipcluster.runs.checkpoints import is_complete
from clipcluster.runs.files import read_json
from clipcluster.runs.merge import events, merged_metrics
from tests.consumed import merged_samples

VOLATILE = {"attempt", "time", "samples_per_second", "data_wait_seconds"}


def losses(run: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in merged_metrics(run)]


def samples(run: Any) -> list[tuple[int, int, str]]:
    return [(line["step"], line["slot"], line["key"]) for line in merged_samples(run)]


def differing_tensors(one: Path, other: Path) -> list[str]:
    differing = []
    for name in ("model", "ema", "optimizer"):
        left, right = load_file(one / f"{name}.safetensors"), load_file(other / f"{name}.safetensors")
        assert left.keys() == right.keys()
        differing += [f"{name}: {key}" for key in left if not torch.equal(left[key], right[key])]
    return differing


def ranked_run(toy: ModuleType, path: Path) -> Any:
    run = toy.new_run(path)
    toy.claim(run)
    return run


def wait_for_checkpoint(run: Any) -> None:
    deadline = time.monotonic() + 60
    while not list(run.checkpoints.glob("step-*")):
        assert time.monotonic() < deadline, "no checkpoint within a minute"
        time.sleep(0.02)


SIZE = 4


@pytest.mark.parametrize(
    ("backward", "changes"),
    [
        ("whole", {}),
        pytest.param("cached", {}, marks=pytest.mark.long),
        pytest.param("cached", {"compile": True}, marks=pytest.mark.long),
        pytest.param("whole", {"auto": True}, marks=pytest.mark.long),
        pytest.param("whole", {"optimizer": "lamb"}, marks=pytest.mark.long),
        pytest.param("cached", {"optimizer": "muon"}, marks=pytest.mark.long),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(
    toy: ModuleType, tmp_path: Path, start_ranks: Any, backward: str, changes: dict[str, Any]
) -> None:
    """Through evaluations and a stage: the words train from step 6 on, wrapped again.

    Every rank has a part of its own, which counts its steps.
    """
    whole, stopped = ranked_run(toy, tmp_path / "whole"), ranked_run(toy, tmp_path / "stopped")
    script = {"evaluate_every": 6, "thaw_at": 6, "backward": backward, "own_part": True, **changes}
    start_ranks(whole, SIZE, {**script, "auto": False}).finish(0)
    attempts = [
        {**script, "stop_at": 0},  # right after the discarded pass
        {**script, "stop_at": 2, "stop_rank": SIZE - 1},
        {**script, "stop_at": 3},  # and after the one that follows a resume
        {**script, "stop_in_evaluation": True},
        {**script, "stop_at": 9},
        script,
    ]
    start_ranks(stopped, SIZE, *attempts).finish(0)
    assert [stopped.attempt(n).outcome()["step"] for n in range(1, 7)] == [1, 3, 4, 6, 10, 12]
    assert losses(stopped) == losses(whole)
    assert samples(stopped) == samples(whole)
    assert len(samples(whole)) == 12 * 16
    end = "checkpoints/step-00000012"
    assert differing_tensors(stopped.path / end, whole.path / end) == []
    own = [load_file(stopped.path / end / f"seen-rank-0000{rank}.safetensors") for rank in range(SIZE)]
    assert [int(tensors["total"]) for tensors in own] == [12 * (rank + 1) for rank in range(SIZE)]
    assert is_complete(stopped.path / end)
    asked = [event for event in events(stopped) if event["event"] == "stop_requested"]
    assert {event["attempt"] for event in asked} == {1, 2, 3, 4, 5}


@pytest.mark.long
def test_without_a_rehearsal_a_resume_differs(toy: ModuleType, tmp_path: Path, start_ranks: Any) -> None:
    """The test above would notice: DDP reorders its buckets after the first reduced backward pass."""
    whole, stopped = ranked_run(toy, tmp_path / "whole"), ranked_run(toy, tmp_path / "stopped")
    script = {"rehearse": False}
    start_ranks(whole, SIZE, script).finish(0)
    start_ranks(stopped, SIZE, {**script, "stop_at": 3}, script).finish(0)
    end = "checkpoints/step-00000012"
    assert differing_tensors(stopped.path / end, whole.path / end) != []


def test_ranks_agree_on_what_one_of_them_found(toy: ModuleType, tmp_path: Path, start_ranks: Any) -> None:
    """A loss that is not finite on rank 1 alone is skipped on both; after a row of them both go back."""
    run = ranked_run(toy, tmp_path / "run")
    script = {"poison": [2, 5, 6, 7], "poison_rank": 1, "save_every": 1, "keep_last": 12, "limit": 2}
    start_ranks(run, 2, script).finish(0)
    assert differing_tensors(run.checkpoints / "step-00000002", run.checkpoints / "step-00000003") == []
    assert differing_tensors(run.checkpoints / "step-00000003", run.checkpoints / "step-00000004") != []
    assert [event["event"] for event in events(run)].count("roll_back") == 1
    assert read_json(run.newest().path / "roll_back.json")["skipped"] == [[5, 8]]
    consumed = [int(key.split("-")[0]) for _, slot, key in samples(run) if slot == 0]
    assert consumed == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14]


def test_ranks_agree_on_which_evaluation_is_owed(toy: ModuleType, tmp_path: Path, start_ranks: Any) -> None:
    """A resume of a run whose last step was evaluated after its checkpoint, which one rank does not see."""
    run = ranked_run(toy, tmp_path / "run")
    script = {"steps": 4, "evaluate_every": 4}
    start_ranks(run, 3, script, {**script, "blind": 2, "silence": 10}).finish(0)
    assert run.attempt(2).outcome()["outcome"] == "finished"


def test_a_signal_to_one_rank_stops_all(toy: ModuleType, tmp_path: Path, start_ranks: Any) -> None:
    run = ranked_run(toy, tmp_path / "run")
    ranks = start_ranks(run, 2, {"steps": 5000, "save_every": 7, "pause": 0.01, "record": False})
    wait_for_checkpoint(run)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    ranks.finish(85)
    outcome = run.newest().outcome()
    assert outcome["outcome"] == "stopped"
    assert outcome["reason"] == "rank 1 got SIGTERM"
    assert (run.checkpoints / f"step-{outcome['step']:08d}" / "manifest.json").is_file()


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(
    toy: ModuleType, tmp_path: Path, start_ranks: Any
) -> None:
    script = {"steps": 60, "save_every": 7, "pause": 0.01}
    whole, killed = ranked_run(toy, tmp_path / "whole"), ranked_run(toy, tmp_path / "killed")
    start_ranks(whole, SIZE, script).finish(0)
    ranks = start_ranks(killed, SIZE, script)
    wait_for_checkpoint(killed)
    ranks.processes[1].kill()
    for process in ranks.processes:
        process.join(60)
    assert "LostPeers" in ranks.logs[0].read_text()
    assert killed.newest().outcome() is None
    toy.claim(killed)
    start_ranks(killed, SIZE, script).finish(0)
    resumed = [event["step"] for event in events(killed) if event["event"] == "resume"]
    assert len(resumed) == 1
    assert 0 < resumed[0] < 60
    assert resumed[0] % 7 == 0
    assert losses(killed) == losses(whole)
    assert samples(killed) == samples(whole)
    end = "checkpoints/step-00000060"
    assert differing_tensors(killed.path / end, whole.path / end) == []


@pytest.mark.long
def test_peers_wait_for_a_slow_disk_however_long(toy: ModuleType, tmp_path: Path, start_ranks: Any) -> None:
    """Saving and verifying take rank 0 longer than the silence after which a rank counts as lost."""
    run = ranked_run(toy, tmp_path / "run")
    script = {"steps": 4, "save_every": 2, "silence": 2.0, "slow_disk": 3.0}
    start_ranks(run, 2, {**script, "stop_at": 1}, script).finish(0)
    assert [event["step"] for event in events(run) if event["event"] == "checkpoint"] == [2, 4]


def test_averages_begin_alike_on_all_ranks(toy: ModuleType, tmp_path: Path) -> None:
    """They are measured together, each rank with its own."""
    run = ranked_run(toy, tmp_path / "run")
    script = Path(__file__).with_name("averages_of_ranks.py")
    subprocess.run([sys.executable, script, tmp_path, run.path], check=True)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@pytest.mark.long
def test_a_stopped_rank_stalls_the_others(toy: ModuleType, tmp_path: Path, start_ranks: Any) -> None:
    """They wait for it inside a collective of the backward pass, which no thread of Python can leave."""
    run = ranked_run(toy, tmp_path / "run")
    ranks = start_ranks(run, 3, {"steps": 5000, "record": False, "stalled_after": 1.5, "sigstop_at": {1: 20}})
    for rank in (0, 2):
        ranks.processes[rank].join(60)
        assert ranks.processes[rank].exitcode == 94, ranks.logs[rank].read_text()
    (stalled,) = [event for event in events(run) if event["event"] == "stalled"]
    assert stalled["ranks"] == [1]
    assert "in _engine_run_backward\n" in ranks.logs[0].read_text(), "the stack of the step"
    assert run.newest().outcome() is None
    records = read_json(run.newest().path / "stalled/collectives-0.json")
    assert records["gloo"]["entries"][-1]["state"] != "completed"


@pytest.mark.long
@pytest.mark.parametrize("backward", ["whole", "cached"])
def test_a_slow_rank_is_named(toy: ModuleType, tmp_path: Path, start_ranks: Any, backward: str) -> None:
    """All ranks take equally long for a step; the time that is a rank's own is longer for one of them."""
    run = ranked_run(toy, tmp_path / "run")
    start_ranks(run, 4, {"steps": 12, "slow": {1: 0.3}, "backward": backward}).finish(0)
    (slow,) = [event for event in events(run) if event["event"] == "slow"]
    assert slow["ranks"] == [1]
    assert slow["share"][0] > 1.5 * slow["median_share"]
    assert slow["data_share"][0] < slow["share"][0] / 2, "it computes for longer"
    fast = ranked_run(toy, tmp_path / "fast")
    start_ranks(fast, 4, {"steps": 12, "slow": dict.fromkeys(range(4), 0.3), "backward": backward}).finish(0)
    assert not [event for event in events(fast) if event["event"] == "slow"]


@pytest.mark.long
def test_a_save_under_way_at_the_signal_is_finished_and_not_begun_again(
    toy: ModuleType, tmp_path: Path, start_ranks: Any
) -> None:
    """All ranks get the signal, as at a preemption, and a second one while the last save is written."""
    run = ranked_run(toy, tmp_path / "run")
    script = {"steps": 5000, "save_every": 20, "pause": 0.02, "slow_disk": 3.0, "record": False}
    ranks = start_ranks(run, 2, script)
    deadline = time.monotonic() + 90
    while max((line["step"] for line in merged_metrics(run)), default=0) < 22:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not list(run.checkpoints.glob("step-*")), "the save of step 20 is under way"
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGTERM)
    while not list(run.checkpoints.glob("step-*")):
        time.sleep(0.02)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    ranks.finish(85)
    step = run.newest().outcome()["step"]
    assert step > 20
    saves = [event["step"] for event in events(run) if event["event"] == "checkpoint"]
    assert saves == [20, step]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000020", f"step-{step:08d}"]
